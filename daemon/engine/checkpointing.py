"""The seam between the engine and whatever keeps checkpoints: promises, and their data.

`daemon.cache.CheckpointCache` fulfils it without being imported; tests use an in-memory one.
All calls come from the engine thread. Positions are multiples of PAGE_TOKENS.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from msgspec import Struct

from daemon.engine.requests import Birth, Boundary, Reason

HostBytes = bytes | bytearray | memoryview


class Found(Struct, frozen=True):
    """A stored checkpoint that is a prefix of a timeline's tokens."""

    position: int
    born: Birth
    reason: Reason


class Snapshot(Struct, frozen=True):
    """All that a sequence is at `position`, as bytes that only the engine can read.

    `pages` holds KV page i under key i; a loaded snapshot has all of [0, position / PAGE_TOKENS),
    one that is saved only those that `missing_pages` named.
    """

    position: int
    born: Birth
    state: HostBytes
    pages: Mapping[int, HostBytes]


class Timeline(Protocol):
    """One sequence's tokens, as the store sees them. Belongs to one sequence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append decoded tokens."""
        ...

    def find(self, limit: int, strict: bool) -> Found | None:
        """The longest usable checkpoint at a position <= limit; memory only, no I/O.

        At equal positions one born by prompt evaluation wins; `strict` finds no other.
        """
        ...

    def load(self, found: Found) -> "Future[Snapshot | None]":
        """Read it on another thread; None when it proved damaged or has gone meanwhile."""
        ...

    def positions(self, boundaries: Sequence[Boundary], start: int) -> Mapping[int, Reason]:
        """Where, in the prompt after `start`, a checkpoint is wanted and not stored yet."""
        ...

    def missing_pages(self, position: int, born: Birth) -> Sequence[int]:
        """Indices of the pages below `position` that are not stored (or queued) with that birth."""
        ...

    def save(self, snapshot: Snapshot, reason: Reason) -> None:
        """Queue for writing; findable at once, never waits. Takes the buffers over."""
        ...


class CheckpointStore(Protocol):
    """Where checkpoints live."""

    def timeline(self, tokens: Sequence[int], session: str) -> Timeline:
        """Begin with a prompt; `session` groups checkpoints for people, not for look-up."""
        ...
