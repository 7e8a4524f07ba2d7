"""Snapshots on their way from the device to the store, while the engine goes on.

Owns what is under way. Reading is put into the device's order of work, so that slots and pages may
be used again at once; what has arrived is handed to its sequence's timeline on the thread that
brought it, one snapshot after the other. All else on the engine's thread.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth, Reason, Snapshot
from daemon.engine.backends.backend import Backend, Contents
from daemon.engine.memory.residents import may_go_on
from daemon.engine.sequence import Sequence
from daemon.errors import DeviceLost, QwendError

logger = logging.getLogger(__name__)


class _Save(Struct, frozen=True):
    sequence: Sequence
    position: int
    born: Birth
    reason: Reason
    num_grid_pages: int
    missing: tuple[int, ...]
    handed_over: Future[None]

    def brings(self, sequence: Sequence, born: Birth) -> bool:
        """Whether its pages are those of a sequence: its own, or computed alike on the grid."""
        if self.sequence is sequence:
            return True
        shared = sequence.timeline.shared_with(self.sequence.timeline)
        return self.born == born == "prompt" and shared >= self.position


class Saving:
    """Begun in order, finished in order.

    Args:
        wake: called on any thread when a snapshot has been handed over.
    """

    def __init__(self, backend: Backend, wake: Callable[[], None]) -> None:
        self._backend = backend
        self._wake = wake
        self._under_way: list[_Save] = []

    def begin(
        self, sequence: Sequence, position: int, slot: int, born: Birth, reason: Reason
    ) -> None:
        """Save the state in `slot`, which is the sequence's at `position`; returns at once."""
        num_grid_pages = min(sequence.num_grid_pages, position // PAGE_TOKENS)
        first = max((s.position for s in self._under_way if s.brings(sequence, born)), default=0)
        missing = tuple(
            index
            for index in sequence.timeline.missing_pages(position, num_grid_pages)
            if index >= first // PAGE_TOKENS
        )
        reading = self._backend.begin_read(slot, [sequence.pages[index] for index in missing])
        save = _Save(sequence, position, born, reason, num_grid_pages, missing, Future())
        self._under_way.append(save)
        sequence.num_kept = max(sequence.num_kept, position)
        reading.add_done_callback(lambda read: self._hand_over(save, read))

    def has_own(self, sequence: Sequence) -> bool:
        """Whether something of a sequence is under way: its timeline is in use."""
        self.forget_done()
        return any(save.sequence is sequence for save in self._under_way)

    def furthest(self, sequence: Sequence, strict: bool) -> int:
        """The position of the longest checkpoint under way that a sequence would find, or 0."""
        self.forget_done()
        limit = sequence.cached_limit
        return max(
            (
                save.position
                for save in self._under_way
                if may_go_on(save.position, save.born, limit, strict)
                and sequence.timeline.shared_with(save.sequence.timeline) >= save.position
            ),
            default=0,
        )

    def forget_done(self) -> None:
        """Drop what has been handed over; what the device or the store refused is lost.

        Raises:
            DeviceLost: nothing can be read any more.
        """
        done = [save for save in self._under_way if save.handed_over.done()]
        self._under_way = [save for save in self._under_way if not save.handed_over.done()]
        for save in done:
            error = save.handed_over.exception()
            if error is None:
                continue
            if isinstance(error, DeviceLost) or not isinstance(error, QwendError):
                raise error
            logger.error("a checkpoint was not kept: %s", error)

    def finish(self) -> None:
        """Wait until everything has been handed over."""
        for save in self._under_way:
            save.handed_over.exception()
        self.forget_done()

    def _hand_over(self, save: _Save, read: Future[Contents]) -> None:
        try:
            state, contents = read.result()
            pages = dict(zip(save.missing, contents, strict=True))
            snapshot = Snapshot(save.position, save.born, save.num_grid_pages, state, pages)
            save.sequence.timeline.save(snapshot, save.reason)
        except BaseException as error:
            save.handed_over.set_exception(error)
        else:
            save.handed_over.set_result(None)
        self._wake()
