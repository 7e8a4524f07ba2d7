"""What a sequence begins with, once it has its places: a checkpoint, what lies there, or nothing.

Owns the way from there to the first token to evaluate: waiting for a better checkpoint that is
being made, reading the best one, and letting it go to the device, beside the steps. Engine thread
only.
"""

import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future

from daemon.checkpoint import Found, Snapshot
from daemon.engine.backends.backend import Backend, Writing
from daemon.engine.memory.residents import Resident
from daemon.engine.saving import Saving
from daemon.engine.sequence import Phase, Sequence
from daemon.engine.siblings import Siblings
from daemon.errors import DeviceLost

logger = logging.getLogger(__name__)


class Restoring:
    """Sequences in Phase.RESTORING, and how they leave it.

    Args:
        strict: restore only states that were born by prompt evaluation.
        start: called with a sequence whose slot and pages have so many tokens.
        wake: called, on any thread, when a checkpoint has been read or is on its way to the device.
    """

    def __init__(
        self,
        backend: Backend,
        saving: Saving,
        *,
        strict: bool,
        start: Callable[[Sequence, int], None],
        wake: Callable[[], None],
    ) -> None:
        self.strict = strict
        self._backend = backend
        self._saving = saving
        self._siblings = Siblings()
        self._start = start
        self._wake = wake

    def begin(self, sequence: Sequence, running: Collection[Sequence]) -> None:
        """Begin to read the best checkpoint, or begin at token 0 when there is none."""
        if not sequence.is_kept:
            self._start_audit(sequence)
            return
        sequence.phase = Phase.RESTORING
        if self._saving.concerns(sequence):
            return
        strict = self.strict or sequence.is_idle_work
        found = sequence.timeline.find(sequence.cached_limit, strict)
        start = found.position if found else 0
        if self._siblings.follow_one(sequence, running, start, strict):
            return
        resident, sequence.resident = sequence.resident, None
        # What the store no longer has was evicted, or wiped: the device must not remember it.
        if resident is not None and found is not None and found.position == resident.position:
            self._go_on(sequence, resident, found)
            return
        sequence.found = found
        boundaries = sequence.request.boundaries
        if not sequence.request.max_tokens and not sequence.timeline.positions(boundaries, 0):
            self._start(sequence, start)
        elif found is None:
            self._start_cold(sequence)
        else:
            sequence.restoring = sequence.timeline.load(found)
            sequence.restoring.add_done_callback(lambda _: self._wake())

    def advance(self, running: Collection[Sequence]) -> int:
        """Put checkpoints that have been read onto the device, and begin with those that are on
        their way there; counts them."""
        restoring = [sequence for sequence in running if sequence.phase is Phase.RESTORING]
        return sum(self._advance(sequence, running) for sequence in restoring)

    def _advance(self, sequence: Sequence, running: Collection[Sequence]) -> bool:
        if sequence.restoring is not None:
            if not sequence.restoring.done():
                return False
            self._write(sequence, sequence.restoring, running)
        elif sequence.writing is not None:
            if not sequence.writing.given.done():
                return False
            self._start_restored(sequence, sequence.writing)
        elif self._siblings.awaits(sequence) or self._saving.concerns(sequence):
            return False
        else:
            self.begin(sequence, running)
        return True

    def _write(
        self, sequence: Sequence, read: Future[Snapshot | None], running: Collection[Sequence]
    ) -> None:
        """Let the snapshot that was read go to the device."""
        sequence.restoring = None
        error = read.exception()
        if error is not None:
            logger.error("a checkpoint could not be read: %s", error)
            self._start_cold(sequence)
        elif (snapshot := read.result()) is None:
            self.begin(sequence, running)
        else:
            pages = {sequence.pages[index]: content for index, content in snapshot.pages.items()}
            sequence.born, sequence.num_grid_pages = snapshot.born, snapshot.num_grid_pages
            sequence.writing = self._backend.begin_write(sequence.slot, snapshot.state, pages)
            sequence.writing.given.add_done_callback(lambda _: self._wake())
            if sequence.writing.given.done():
                self._start_restored(sequence, sequence.writing)

    def _start_restored(self, sequence: Sequence, writing: Writing) -> None:
        """Go on from a snapshot that is on its way: what needs it waits for it on the device."""
        error = writing.given.exception()
        if isinstance(error, DeviceLost):
            raise error
        if error is not None:
            logger.error("a checkpoint could not be restored: %s", error)
            sequence.writing = None
            self._start_cold(sequence)
            return
        assert sequence.found is not None
        self._start(sequence, sequence.found.position)

    def _go_on(self, sequence: Sequence, resident: Resident, found: Found) -> None:
        """Begin from what lies on the device: the sequence has its pages and its state already."""
        position, born = resident.position, resident.born
        sequence.born, sequence.num_grid_pages = born, resident.num_grid_pages
        sequence.timeline.follow(resident.timeline, position, born, resident.num_grid_pages)
        sequence.found = Found(position, born, found.reason, "device")
        self._start(sequence, position)

    def _start_audit(self, sequence: Sequence) -> None:
        """Begin at token 0, or where a part of such an evaluation of the same prompt has ended."""
        resident, sequence.resident = sequence.resident, None
        if resident is None:
            self._start_cold(sequence)
            return
        sequence.num_grid_pages = resident.num_grid_pages
        self._start(sequence, resident.position)

    def _start_cold(self, sequence: Sequence) -> None:
        self._backend.clear_slot(sequence.slot)
        sequence.born, sequence.num_grid_pages = "prompt", 0
        self._start(sequence, 0)
