"""Checkpoints that wait to be written: found and read like stored ones, from memory.

Owns the payloads until they are on disk. No thread and no disk; not thread-safe: `transfer` guards
it.
"""

import itertools
from collections.abc import Iterable, Iterator

from msgspec import Struct

from daemon.cache.records import (
    PageHeader,
    StateHeader,
    encode_page,
    encode_state,
    with_sum,
)
from daemon.checkpoint import HostBytes


class QueuedPage(Struct, frozen=True):
    """A page's header, its checksum not yet computed, and its payload."""

    header: PageHeader
    payload: HostBytes


class QueuedState(Struct, frozen=True):
    """A state's header, its checksum not yet computed, and its payload."""

    header: StateHeader
    payload: HostBytes


class Job(Struct, frozen=True):
    """A state and those of its pages that are not on disk, the first page first."""

    state: QueuedState
    pages: tuple[QueuedPage, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all payloads."""
        pages = sum(page.header.payload_bytes for page in self.pages)
        return self.state.header.payload_bytes + pages

    def page_records(self) -> list[tuple[bytes, bytes, HostBytes]]:
        """Keys, headers and payloads of the pages; computes their checksums."""
        return [
            (page.header.key, encode_page(with_sum(page.header, page.payload)), page.payload)
            for page in self.pages
        ]

    def state_record(self) -> tuple[bytes, bytes, HostBytes]:
        """Key, header and payload of the state; computes its checksum."""
        header = with_sum(self.state.header, self.state.payload)
        return header.key, encode_state(header), self.state.payload


class WriteQueue:
    """First in, first out. A page is kept once, however many waiting states stand on it.

    Attributes:
        num_bytes: of all payloads.
        unused_bytes: of them, those of states that wait until they are used.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.unused_bytes = 0
        self._unused: set[bytes] = set()
        self._states: dict[bytes, QueuedState] = {}
        self._pages: dict[bytes, QueuedPage] = {}

    @property
    def states(self) -> Iterable[StateHeader]:
        """The states that wait, the oldest first."""
        return [queued.header for queued in self._states.values()]

    def __len__(self) -> int:
        return len(self._states)

    def state(self, key: bytes) -> QueuedState | None:
        """A waiting state."""
        return self._states.get(key)

    def page(self, key: bytes) -> QueuedPage | None:
        """A waiting page."""
        return self._pages.get(key)

    def is_unused(self, key: bytes) -> bool:
        """Whether a state waits until it is used."""
        return key in self._unused

    def add(self, state: QueuedState, pages: Iterable[QueuedPage], is_unused: bool = False) -> None:
        """Append a checkpoint; its buffers must not change any more."""
        self._states[state.header.key] = state
        if is_unused:
            self._unused.add(state.header.key)
            self.unused_bytes += state.header.payload_bytes
        self.num_bytes += state.header.payload_bytes
        for page in pages:
            self._pages[page.header.key] = page
            self.num_bytes += page.header.payload_bytes

    def use(self, key: bytes) -> None:
        """A state is used: from now on it is on its way to the disk, if it waits."""
        if key in self._unused:
            self._unused.remove(key)
            self.unused_bytes -= self._states[key].header.payload_bytes

    def queued(self, *, unused: bool = False) -> Iterator[QueuedState]:
        """What is on its way to the disk, or waits until it is used; the oldest first."""
        return (state for key, state in self._states.items() if (key in self._unused) is unused)

    def job(self, state: QueuedState, keys_up: Iterable[bytes]) -> Job:
        """What has to be written for a state, given the keys of its pages from last to first.

        A page is written with the first state on it, so those that wait are the last ones.
        """
        waiting = itertools.takewhile(self._pages.__contains__, keys_up)
        return Job(state, tuple(self._pages[key] for key in waiting)[::-1])

    def remove(self, states: Iterable[bytes], pages: Iterable[bytes]) -> None:
        """Forget what was written or given up; keys that do not wait are ignored."""
        for key in states:
            self.use(key)
            state = self._states.pop(key, None)
            self.num_bytes -= state.header.payload_bytes if state else 0
        for key in pages:
            page = self._pages.pop(key, None)
            self.num_bytes -= page.header.payload_bytes if page else 0
