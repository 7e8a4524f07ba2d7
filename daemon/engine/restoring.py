"""How a sequence that has its places begins: on the device, from the store, or with token 0.

Owns the choice and the way there: what the device has may be used at once, a checkpoint is read by
the store, then goes to the device while the engine goes on. Engine thread only.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

from daemon.checkpoint import Found, Snapshot
from daemon.engine.backends.backend import Backend, Writing
from daemon.engine.memory.residents import Branch
from daemon.engine.saving import Saving
from daemon.engine.scheduler import Scheduler
from daemon.engine.sequence import Phase, Sequence
from daemon.errors import DeviceLost

logger = logging.getLogger(__name__)


class Restoring:
    """Sequences on their way from their places to their first step.

    Args:
        strict: restore only states that were born by prompt evaluation.
        start: called with a sequence and the position at which its evaluation begins.
        wake: called, on any thread, when there is more to do.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        saving: Saving,
        strict: bool,
        start: Callable[[Sequence, int], None],
        wake: Callable[[], None],
    ) -> None:
        self.strict = strict
        self._backend = backend
        self._scheduler = scheduler
        self._saving = saving
        self._start = start
        self._wake = wake

    def take_state(self, sequence: Sequence) -> None:
        """Copy the state of the branch that the scheduler chose, before its owner goes on."""
        if sequence.branch is not None and sequence.branch.slot != sequence.slot:
            self._backend.copy_slot(sequence.branch.slot, sequence.slot)

    def begin(self, sequence: Sequence) -> None:
        """Begin to read the best checkpoint, or begin with what is there already, or at token 0."""
        if not sequence.is_kept:
            self._begin_audit(sequence)
            return
        # The best may be on its way to the store, or the timeline in use: then `advance` tries.
        sequence.phase = Phase.RESTORING
        if self._saving.has_own(sequence):
            return
        strict = self.strict or sequence.is_idle_work
        found = sequence.timeline.find(sequence.cached_limit, strict)
        num_coming = self._saving.furthest(sequence, strict)
        if sequence.branch is not None:
            if _is_best(sequence.branch, found, num_coming):
                self._go_on(sequence, sequence.branch, found)
                return
            if not self._leave_branch(sequence, sequence.branch, max(_end(found), num_coming)):
                return
        if num_coming > _end(found):
            return
        sequence.found = found
        boundaries = sequence.request.boundaries
        if not sequence.request.max_tokens and not sequence.timeline.positions(boundaries, 0):
            self._start(sequence, _end(found))
        elif found is None:
            self._start_cold(sequence)
        else:
            sequence.restoring = sequence.timeline.load(found)
            sequence.restoring.add_done_callback(lambda _: self._wake())

    def advance(self) -> int:
        """Put checkpoints that have been read onto the device, and begin with those that are on
        their way there; counts them."""
        restoring = [s for s in self._scheduler.running if s.phase is Phase.RESTORING]
        return sum(self._advance(sequence) for sequence in restoring)

    def _advance(self, sequence: Sequence) -> bool:
        if sequence.restoring is not None:
            if not sequence.restoring.done():
                return False
            self._write(sequence, sequence.restoring)
        elif sequence.writing is not None:
            if not sequence.writing.given.done():
                return False
            self._start_restored(sequence, sequence.writing)
        else:
            self.begin(sequence)
            return sequence.phase is not Phase.RESTORING or sequence.restoring is not None
        return True

    def _go_on(self, sequence: Sequence, branch: Branch, found: Found | None) -> None:
        """Begin from what lies on the device: the sequence has its pages and its state already."""
        position, born = branch.position, branch.born
        sequence.born, sequence.num_grid_pages = born, branch.num_grid_pages
        sequence.timeline.follow(branch.trail)
        is_stored = found is not None and found.position == position
        reason = found.reason if found is not None and is_stored else "junction"
        sequence.found = Found(position, born, reason, "device")
        if branch.holder == "inner" and not is_stored:
            self._keep_used(sequence, branch)
        if branch.holder == "sequence" and sequence.follows_since_s is None:
            sequence.follows_since_s = time.perf_counter()
        self._start(sequence, position)

    def _keep_used(self, sequence: Sequence, branch: Branch) -> None:
        """The store gets a state inside a message when somebody goes on from it: the prompt that
        sends the same again finds it there, whatever else the device has to keep."""
        self._backend.copy_slot(sequence.slot, sequence.mark_slot)
        sequence.held, sequence.held_born = branch.position, branch.born
        self._saving.begin(sequence, branch.position, sequence.mark_slot, branch.born, "junction")

    def _leave_branch(self, sequence: Sequence, branch: Branch, num_stored: int) -> bool:
        """Go on from the store instead; False when the sequence has to wait for places again."""
        if num_stored < branch.position:
            self._scheduler.places.forget(branch)
        if self._scheduler.leave_branch(sequence):
            return True
        self._scheduler.preempt(sequence)
        return False

    def _write(self, sequence: Sequence, read: Future[Snapshot | None]) -> None:
        """Let the snapshot that was read go to the device."""
        sequence.restoring = None
        error = read.exception()
        if error is not None:
            logger.error("a checkpoint could not be read: %s", error)
            self._start_cold(sequence)
        elif (snapshot := read.result()) is None:
            self.begin(sequence)
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
        self._start(sequence, _end(sequence.found))

    def _begin_audit(self, sequence: Sequence) -> None:
        """At token 0, or where a part of such an evaluation of the same prompt has ended."""
        if sequence.branch is None:
            self._start_cold(sequence)
            return
        sequence.num_grid_pages = sequence.branch.num_grid_pages
        self._start(sequence, sequence.branch.position)

    def _start_cold(self, sequence: Sequence) -> None:
        self._backend.clear_slot(sequence.slot)
        sequence.born, sequence.num_grid_pages = "prompt", 0
        self._start(sequence, 0)


def _end(found: Found | None) -> int:
    return 0 if found is None else found.position


def _is_best(branch: Branch, found: Found | None, num_coming: int) -> bool:
    """Whether to go on from the device: nothing longer is stored or on its way to the store.

    An ended sequence is remembered as long as the store has its end, and no longer.
    """
    num_stored = max(_end(found), num_coming)
    is_ahead = branch.holder != "resident" and branch.position > num_stored
    return is_ahead or branch.position == num_stored
