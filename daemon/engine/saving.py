"""Snapshots on their way from the device to the store, while the engine goes on.

Owns what is under way. Reading is put into the device's order of work, so that slots and pages may
be used again at once; what has arrived is handed to its sequence's timeline. Engine thread only.
"""

from collections import deque

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth, Reason, Snapshot
from daemon.engine.backends.backend import Backend, Reading
from daemon.engine.sequence import Sequence


class _Save(Struct, frozen=True):
    sequence: Sequence
    position: int
    born: Birth
    reason: Reason
    num_grid_pages: int
    missing: tuple[int, ...]
    reading: Reading


class Saving:
    """Begun in order, finished in order."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._under_way: deque[_Save] = deque()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def begin(
        self, sequence: Sequence, position: int, slot: int, born: Birth, reason: Reason
    ) -> None:
        """Save the state in `slot`, which is the sequence's at `position`; returns at once."""
        num_grid_pages = min(sequence.num_grid_pages, position // PAGE_TOKENS)
        first = max((s.position for s in self._under_way if s.sequence is sequence), default=0)
        missing = tuple(
            index
            for index in sequence.timeline.missing_pages(position, num_grid_pages)
            if index >= first // PAGE_TOKENS
        )
        reading = self._backend.begin_read(slot, [sequence.pages[index] for index in missing])
        self._under_way.append(
            _Save(sequence, position, born, reason, num_grid_pages, missing, reading)
        )
        sequence.num_kept = max(sequence.num_kept, position)
        self.finish(wait=False)

    def finish(self, wait: bool) -> None:
        """Hand over what has arrived; with `wait`, everything."""
        while self._under_way and (wait or self._under_way[0].reading.is_done()):
            save = self._under_way.popleft()
            state, contents = save.reading.result()
            pages = dict(zip(save.missing, contents, strict=True))
            snapshot = Snapshot(save.position, save.born, save.num_grid_pages, state, pages)
            save.sequence.timeline.save(snapshot, save.reason)

    def abandon(self) -> None:
        """Forget what is under way: the device is lost."""
        self._under_way.clear()
