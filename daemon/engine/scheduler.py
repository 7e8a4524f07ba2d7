"""Who is evaluated in the next step. Pure host code: no device, no clock, no I/O.

Decoding sequences come first, one token each; the rest of the token budget goes to prompts, to the
one that has waited longest first, with a share for each further one so that none starves. Idle work
is planned only while there is nothing else, the most urgent first. Owns the order of sequences and
the free lists. Engine thread only.
"""

from bisect import insort_left, insort_right
from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth
from daemon.engine.batch import Batch, Capture, Span
from daemon.engine.memory.kv_pages import KVPages
from daemon.engine.memory.residents import Resident, Residents
from daemon.engine.memory.slots import Slots
from daemon.engine.sequence import Phase, Sequence

IDLE_STEP_TOKENS = 256
"""Tokens of idle work in one step: what a request that arrives meanwhile may have to wait for. On a
GPU a tile's width: smaller steps would be slower, larger ones hardly faster."""

MAX_IDLE = 16

MAX_AUDITED = 2
"""Conversations whose audits' evaluation stays on the device for their next."""


class Limits(Struct, frozen=True):
    """`prefill_tokens` is the budget of one step for prompts, a multiple of PAGE_TOKENS.

    `max_residents` ended sequences keep their pages until others need them.
    """

    max_sequences: int
    max_waiting: int
    prefill_tokens: int
    num_pages: int
    num_capture_slots: int
    max_residents: int = 0

    @property
    def num_slots(self) -> int:
        """See the function of this name."""
        return num_slots(self.max_sequences, self.num_capture_slots)


def num_slots(max_sequences: int, num_capture_slots: int) -> int:
    """Two for each sequence (its state, and its mark), and those that captures fill."""
    return 2 * max_sequences + num_capture_slots


class Work(Struct, frozen=True):
    """A batch and the sequences of its spans, in the same order."""

    batch: Batch
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Admits, plans, preempts. A sequence is either waiting or holds two slots and its pages.

    Args:
        strict: go on only from what prompt evaluation made.
    """

    def __init__(self, limits: Limits, strict: bool = False) -> None:
        self.limits = limits
        self.strict = strict
        self.pages = KVPages(limits.num_pages)
        self.slots = Slots(limits.num_slots)
        self.waiting: deque[Sequence] = deque()
        self.idle: list[Sequence] = []
        self.running: list[Sequence] = []
        self.residents = Residents()
        self.audited = Residents()

    @property
    def is_full(self) -> bool:
        """Whether the queue takes no more."""
        return len(self.waiting) >= self.limits.max_waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        if sequence.is_idle_work:
            insort_right(self.idle, sequence, key=_rank)
        else:
            self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give places to waiting sequences, in order, while there are any."""
        admitted = []
        while self.waiting and self._place(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        if self._is_idle_next() and self._place(self.idle[0]):
            admitted.append(self.idle.pop(0))
        return admitted

    def _is_idle_next(self) -> bool:
        """Whether the first piece of idle work is more urgent than all that runs or waits."""
        if not self.idle or self.waiting:
            return False
        return all(self.idle[0].rank < sequence.rank for sequence in self.running)

    def in_the_way(self) -> Sequence | None:
        """Idle work on the device whose places something more urgent needs, after `admit`."""
        if not self.waiting and not self._is_idle_next():
            return None
        return max((s for s in self.running if s.is_idle_work), key=_rank, default=None)

    def surplus_idle(self) -> Sequence | None:
        """When there are too many pieces of idle work, one of the least urgent: the oldest, but the
        newest of the audits, so that those begun come to an end."""
        if len(self.idle) <= MAX_IDLE:
            return None
        last = [s for s in self.idle if s.rank == self.idle[-1].rank]
        return last[0] if last[0].is_kept else last[-1]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its places."""
        for queue in (self.waiting, self.idle):
            if sequence in queue:
                queue.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self._free_places(sequence)

    def leave_resident(self, sequence: Sequence) -> None:
        """Let an ending sequence's pages stay, with the state that it holds on the grid."""
        position = sequence.held
        if not position or not self.limits.max_residents:
            return
        slot, sequence.mark_slot = sequence.mark_slot, -1
        self._add_resident(sequence, position, slot, sequence.held_born)

    def _add_resident(self, sequence: Sequence, position: int, slot: int, born: Birth) -> None:
        residents = self._residents_of(sequence)
        tokens = tuple(sequence.tokens[:position])
        for contained in residents.take_contained(tokens):
            self._free_resident(contained)
        num_pages = position // PAGE_TOKENS
        resident = Resident(
            tokens=tokens,
            pages=sequence.pages[:num_pages],
            slot=slot,
            born=born,
            num_grid_pages=min(sequence.num_grid_pages, num_pages),
            timeline=sequence.timeline,
        )
        sequence.pages = sequence.pages[num_pages:]
        residents.add(resident)
        limit = self.limits.max_residents if sequence.is_kept else MAX_AUDITED
        while len(residents) > limit and (oldest := residents.take_oldest()):
            self._free_resident(oldest)

    def _residents_of(self, sequence: Sequence) -> Residents:
        """What was evaluated without checkpoints is for others of its kind alone."""
        return self.residents if sequence.is_kept else self.audited

    def plan_decode(self) -> Work | None:
        """One token of every decoding sequence; may preempt the youngest to find a page."""
        for sequence in self._in_phase(Phase.DECODE):
            if sequence in self.running:
                self._make_room(sequence)
        sequences = tuple(self._in_phase(Phase.DECODE))
        if not sequences:
            return None
        spans = tuple(
            Span(seq.unevaluated(1), seq.num_evaluated, seq.slot, seq.pages, samples=True)
            for seq in sequences
        )
        return Work(Batch("decode", spans), sequences)

    def plan_prefill(self) -> Work | None:
        """Chunks of prompts within the budget; the captures' slots are taken here.

        A prompt may begin while its checkpoint arrives, unless others decode: they would stand
        still meanwhile.
        """
        waiting = self._in_phase(Phase.PREFILL)
        if self._in_phase(Phase.DECODE):
            waiting = [sequence for sequence in waiting if not sequence.is_arriving]
        budget = self.limits.prefill_tokens
        if all(sequence.is_idle_work for sequence in self.running):
            budget = min(budget, IDLE_STEP_TOKENS)
            first = min((sequence.rank for sequence in waiting), default=0)
            waiting = [sequence for sequence in waiting if sequence.rank == first]
        else:
            waiting = [sequence for sequence in waiting if not sequence.is_idle_work]
        spans, sequences = [], []
        for index, sequence in enumerate(waiting):
            num_others = len(waiting) - index - 1
            span = self._prefill_span(sequence, max(budget - num_others * PAGE_TOKENS, PAGE_TOKENS))
            if len(span.tokens):
                spans.append(span)
                sequences.append(sequence)
                budget -= span.num_chunks * PAGE_TOKENS
            if budget <= 0:
                break
        return Work(Batch("prefill", tuple(spans)), tuple(sequences)) if spans else None

    def give_back(self, captures: Iterable[Capture]) -> None:
        """Free the slots of captures that have been read."""
        for capture in captures:
            self.slots.give_back(capture.slot)

    def _prefill_span(self, sequence: Sequence, limit: int) -> Span:
        """At most `limit` tokens; ends before a position to capture for which no slot is free."""
        start = sequence.num_evaluated
        end = min(start + limit, sequence.goal)
        captures = []
        for position in sorted(p for p in sequence.positions if start < p <= end):
            slot = self._find_slot()
            if slot is None:
                end = position - PAGE_TOKENS
                break
            captures.append(Capture(position, slot))
        tokens = sequence.unevaluated(end - start)
        samples = end == sequence.num_known and sequence.request.max_tokens > 0
        return Span(tokens, start, sequence.slot, sequence.pages, tuple(captures), samples)

    def _make_room(self, sequence: Sequence) -> None:
        while len(sequence.pages) < sequence.num_pages_needed:
            more = self._find_pages(1, after=sequence.pages)
            if more is not None:
                sequence.pages += more
            elif self.preempt(self._least_urgent()) is sequence:
                return

    def preempt(self, sequence: Sequence) -> Sequence:
        """Send a sequence back to the head of its queue; its reply becomes part of the prompt."""
        if not sequence.is_kept:
            self._leave_audit(sequence)
        self._free_places(sequence)
        self.running.remove(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_evaluated = 0
        sequence.mark = sequence.held = 0
        sequence.resident = None
        if sequence.is_idle_work:
            insort_left(self.idle, sequence, key=_rank)
        else:
            self.waiting.appendleft(sequence)
        return sequence

    def _leave_audit(self, sequence: Sequence) -> None:
        """What an interrupted audit has done stays on the device until its places are needed."""
        done = sequence.num_evaluated
        if not done or done % PAGE_TOKENS or not self.limits.max_residents:
            return
        slot, sequence.slot = sequence.slot, -1
        self._add_resident(sequence, done, slot, sequence.born)

    def _place(self, sequence: Sequence) -> bool:
        """Give a sequence its places and let it run; False when there are too few."""
        if len(self.running) >= self.limits.max_sequences:
            return False
        resident = self._take_resident(sequence)
        known = resident.pages if resident else ()
        # One page beyond the prompt, so that the first decoded page never preempts at once.
        count = sequence.num_pages_needed + 1 - len(known)
        pages = self._find_pages(count, after=known, spare_newest=not sequence.is_kept)
        if pages is None:
            if resident is not None:
                self._residents_of(sequence).add(resident)
            return False
        sequence.resident = resident
        sequence.pages = known + pages
        sequence.slot = resident.slot if resident else self._take_slot()
        sequence.mark_slot = self._take_slot()
        self.running.append(sequence)
        return True

    def _take_resident(self, sequence: Sequence) -> Resident | None:
        if sequence.is_idle_work and sequence.is_kept:
            return None
        residents = self._residents_of(sequence)
        return residents.take(sequence.tokens, sequence.cached_limit, self.strict)

    def _find_pages(
        self, count: int, after: tuple[int, ...] = (), spare_newest: bool = False
    ) -> tuple[int, ...] | None:
        """Free pages, in place of residents if need be; audits leave the newest of them."""
        while (pages := self.pages.take(count, after)) is None:
            if not self._free_oldest_resident(spare_newest):
                return None
        return pages

    def _find_slot(self) -> int | None:
        while (slot := self.slots.take()) is None:
            if not self._free_oldest_resident():
                return None
        return slot

    def _free_oldest_resident(self, spare_newest: bool = False) -> bool:
        """The newest goes last: after what audits have done, which takes longer to do again than
        a checkpoint to be restored."""
        resident = self.residents.take_oldest(spare_newest=True) or self.audited.take_oldest()
        if resident is None and not spare_newest:
            resident = self.residents.take_oldest()
        if resident is None:
            return False
        self._free_resident(resident)
        return True

    def _free_resident(self, resident: Resident) -> None:
        self.pages.give_back(resident.pages)
        self.slots.give_back(resident.slot)

    def _least_urgent(self) -> Sequence:
        """Idle work, if any runs; else the youngest sequence."""
        return next((s for s in self.running if s.is_idle_work), self.running[-1])

    def _in_phase(self, phase: Phase) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.phase is phase]

    def _take_slot(self) -> int:
        slot = self._find_slot()
        assert slot is not None, "slots are reserved for max_sequences"
        return slot

    def _free_places(self, sequence: Sequence) -> None:
        sequence.stop_restoring()
        self.pages.give_back(sequence.pages)
        sequence.pages = ()
        for slot in {sequence.slot, sequence.mark_slot} - {-1}:
            self.slots.give_back(slot)
        sequence.slot = sequence.mark_slot = -1


def _rank(sequence: Sequence) -> int:
    return sequence.rank
