"""Who is evaluated in the next step. Pure host code: no device, no clock, no I/O.

Decoding sequences come first, one token each; the rest of the token budget goes to prompts, to the
one that has waited longest first, with a share for each further one so that none starves. Who waits
for what another one evaluates is passed over, and its places are kept for it. Idle work is planned
only while there is nothing else, the most urgent first. Owns the order of sequences; where they lie
is `Places`' to say. Engine thread only.
"""

from bisect import insort_left, insort_right
from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth
from daemon.engine.batch import Batch, Capture, Span
from daemon.engine.following import Followers
from daemon.engine.memory.inner_states import InnerState, worth
from daemon.engine.memory.places import Places
from daemon.engine.memory.residents import Branch, Resident, Residents, may_go_on
from daemon.engine.sequence import Phase, Sequence

IDLE_STEP_TOKENS = 256
"""Tokens of idle work in one step: what a request that arrives meanwhile may have to wait for. On a
GPU a tile's width: smaller steps would be slower, larger ones hardly faster."""

MAX_IDLE = 64
"""Pieces of idle work: each reply of each conversation leaves two."""

MAX_AUDITED = 2
"""Conversations whose audits' evaluation stays on the device for their next."""


class Limits(Struct, frozen=True):
    """`prefill_tokens` is the budget of one step for prompts, a multiple of PAGE_TOKENS.

    `max_residents` prefixes stay on the device, when no sequence has them, until others need their
    places: ended sequences, and places where one left another. `num_inner_slots` states inside
    messages stay too.
    """

    max_sequences: int
    max_waiting: int
    prefill_tokens: int
    num_pages: int
    num_capture_slots: int
    max_residents: int = 0
    num_inner_slots: int = 0

    @property
    def num_slots(self) -> int:
        """All of them."""
        return num_slots(self.max_sequences, self.num_capture_slots) + self.num_inner_slots


def num_slots(max_sequences: int, num_capture_slots: int) -> int:
    """Two for each sequence (its state, and its mark), and those that captures fill."""
    return 2 * max_sequences + num_capture_slots


class Work(Struct, frozen=True):
    """A batch and the sequences of its spans, in the same order."""

    batch: Batch
    sequences: tuple[Sequence, ...]


class Kept(Struct):
    """Places that others ahead in the queue will need."""

    num_sequences: int = 0
    num_pages: int = 0


class Scheduler:
    """Admits, plans, preempts. A sequence is either waiting or holds two slots and its pages.

    Args:
        strict: go on only from what prompt evaluation made.
    """

    def __init__(self, limits: Limits, strict: bool = False) -> None:
        self.limits = limits
        self.strict = strict
        self.places = Places(limits.num_pages, limits.num_slots, limits.num_inner_slots)
        self.waiting: deque[Sequence] = deque()
        self.idle: list[Sequence] = []
        self.running: list[Sequence] = []
        self.followers = Followers(limits.prefill_tokens)

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
        """Give places to waiting sequences, in order, while there are any.

        The state at an admitted one's `branch` is to be copied into its slot at once.
        """
        admitted = []
        self.followers.look(self.running, self.waiting, self._start_of)
        kept = Kept()
        for sequence in tuple(self.waiting):
            lead = self.followers.lead_of(sequence)
            if lead is not None:
                kept.num_sequences += 1
                kept.num_pages += _num_places(sequence) - lead.split // PAGE_TOKENS
            elif self._place(sequence, kept):
                self.waiting.remove(sequence)
                self.followers.forget(sequence)
                admitted.append(sequence)
            else:
                break
        if self._is_idle_next() and self._place(self.idle[0], kept):
            admitted.append(self.idle.pop(0))
        return admitted

    def _is_idle_next(self) -> bool:
        """Whether the first piece of idle work is more urgent than all that runs or waits."""
        if not self.idle or self.waiting:
            return False
        return all(self.idle[0].rank < sequence.rank for sequence in self.running)

    def in_the_way(self) -> Sequence | None:
        """Idle work on the device whose places something more urgent needs, after `admit`."""
        is_needed = any(not self.followers.lead_of(sequence) for sequence in self.waiting)
        if not is_needed and not self._is_idle_next():
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
        self.followers.forget(sequence)
        sequence.phase = Phase.ENDED

    def leave_resident(self, sequence: Sequence) -> None:
        """Let a leaving sequence's pages stay, with the state that it holds on the grid."""
        position = sequence.held
        if not position or not self.limits.max_residents:
            return
        self._free_contained(sequence, position)
        slot, sequence.mark_slot = sequence.mark_slot, -1
        self._add_resident(sequence, position, slot, sequence.held_born)

    def leave_junction(self, sequence: Sequence, capture: Capture) -> bool:
        """Let the state of a capture stay, and its slot with it, if others go on from there."""
        is_awaited = capture.position in self.followers.splits(sequence)
        if not is_awaited or not self.limits.max_residents:
            return False
        self._add_resident(sequence, capture.position, capture.slot, sequence.born)
        return True

    def leave_inside(self, sequence: Sequence, captures: Iterable[Capture]) -> None:
        """Let states inside messages stay, with their slots; captures of one span, in order."""
        name_of = sequence.timeline.name
        before: InnerState | None = None
        for capture in captures:
            position = capture.position
            before = before or self.places.inner.find(name_of, position - PAGE_TOKENS)
            branch = sequence.branch_at(position, capture.slot, sequence.born, "inner")
            reason = sequence.inside[position]
            before = self.places.stay_inside(name_of(position), branch, reason, before)

    def make_room(self) -> Sequence | None:
        """Find pages for the next token of every decoding sequence.

        Returns:
            Who is to be preempted, where there are too few; then there is more to find.
        """
        for sequence in self._in_phase(Phase.DECODE):
            while len(sequence.pages) < sequence.num_pages_needed:
                more = self.places.find_pages(1, after=sequence.pages)
                if more is None:
                    return self._least_urgent()
                sequence.pages += more
        return None

    def plan_decode(self) -> Work | None:
        """One token of every decoding sequence, for which there is room."""
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
            self.places.give_back(capture.slot)

    def _prefill_span(self, sequence: Sequence, limit: int) -> Span:
        """At most `limit` tokens; ends before a position to capture for which no slot is free."""
        start = sequence.num_evaluated
        end = min(start + limit, sequence.goal)
        captures = []
        for position in sorted(p for p in sequence.positions if start < p <= end):
            slot = self.places.find_slot()
            if slot is None:
                end = position - PAGE_TOKENS
                break
            captures.append(Capture(position, slot))
        captures += self._inner_captures(sequence, start, end)
        tokens = sequence.unevaluated(end - start)
        samples = end == sequence.num_known and sequence.request.max_tokens > 0
        return Span(tokens, start, sequence.slot, sequence.pages, tuple(captures), samples)

    def preempt(self, sequence: Sequence) -> None:
        """Send a sequence back to the head of its queue; its reply becomes part of the prompt."""
        if not sequence.is_kept:
            self._leave_audit(sequence)
        self._free_places(sequence)
        self.running.remove(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_evaluated = 0
        sequence.mark = sequence.held = 0
        sequence.branch = None
        if sequence.is_idle_work:
            insort_left(self.idle, sequence, key=_rank)
        else:
            self.waiting.appendleft(sequence)

    def _leave_audit(self, sequence: Sequence) -> None:
        """What an interrupted audit has done stays on the device until its places are needed."""
        done = sequence.num_evaluated
        if not done or done % PAGE_TOKENS or not self.limits.max_residents:
            return
        self._free_contained(sequence, done)
        slot, sequence.slot = sequence.slot, -1
        self._add_resident(sequence, done, slot, sequence.born)

    def leave_branch(self, sequence: Sequence) -> bool:
        """Give a sequence pages of its own instead of those of its branch, which others may hold;
        False when there are too few."""
        assert sequence.branch is not None
        known, sequence.branch = sequence.branch.pages, None
        sequence.pages = sequence.pages[len(known) :]
        self.places.pages.give_back(known)
        pages = self.places.find_pages(len(known))
        sequence.pages = (pages or ()) + sequence.pages
        return pages is not None

    def _place(self, sequence: Sequence, kept: Kept) -> bool:
        """Give a sequence its places and let it run; False when there are too few."""
        if len(self.running) + kept.num_sequences >= self.limits.max_sequences:
            return False
        branch = self._find_branch(sequence)
        known = branch.pages if branch else ()
        self.places.pages.share(known)
        count = _num_places(sequence) - len(known)
        pages = self.places.find_pages(count, known, kept.num_pages, not sequence.is_kept)
        if pages is None:
            self.places.pages.give_back(known)
            return False
        if not sequence.is_idle_work:
            self.places.inner.visit(sequence.timeline.name, sequence.cached_limit)
        sequence.branch = branch
        sequence.pages = known + pages
        sequence.slot, sequence.mark_slot = self._take_slot(), self._take_slot()
        self.running.append(sequence)
        return True

    def _start_of(self, sequence: Sequence) -> int:
        """How many tokens of a waiting sequence need not be evaluated, as things are."""
        branch = self._find_branch(sequence)
        found = sequence.timeline.find(sequence.cached_limit, self.strict)
        on_device = 0 if branch is None else branch.position
        return on_device if found is None else max(on_device, found.position)

    def _find_branch(self, sequence: Sequence) -> Branch | None:
        """The longest beginning of a sequence that lies on the device, with the state after it."""
        limit = sequence.cached_limit
        if not sequence.is_kept:
            return self.places.audited.find(sequence.tokens, limit, strict=True)
        if sequence.is_idle_work:
            return None
        fitting = [
            branch
            for other in self.running
            for branch in other.branches()
            if may_go_on(branch.position, branch.born, limit, self.strict)
            and sequence.timeline.shared_with(other.timeline) >= branch.position
        ]
        resident = self.places.residents.find(sequence.tokens, limit, self.strict)
        if resident is not None:
            self.places.residents.touch(resident, self.places.inner.num_visits)
            fitting.append(resident)
        inner = self.places.inner.find(sequence.timeline.name, limit, self.strict)
        if inner is not None:
            fitting.append(inner.branch)
        return max(fitting, key=lambda branch: branch.position, default=None)

    def _residents_of(self, sequence: Sequence) -> Residents:
        """What was evaluated without checkpoints is for others of its kind alone."""
        return self.places.residents if sequence.is_kept else self.places.audited

    def _add_resident(self, sequence: Sequence, position: int, slot: int, born: Birth) -> None:
        """A part of a sequence stays, with the slot of its state."""
        branch = sequence.branch_at(position, slot, born, "resident")
        limit = self.limits.max_residents if sequence.is_kept else MAX_AUDITED
        last_visit = self.places.inner.num_visits
        resident = Resident(sequence.tokens[:position], branch, last_visit)
        self.places.stay(self._residents_of(sequence), resident, limit)

    def _inner_captures(self, sequence: Sequence, start: int, end: int) -> list[Capture]:
        """States inside messages on the way from `start` to `end`, those for which there are slots.

        Where one as good is here already, none is taken.
        """
        positions = sequence.inside_between(start, end)
        inner, name_of = self.places.inner, sequence.timeline.name
        nearest = inner.find(name_of, start) if positions else None
        last = 0 if nearest is None else nearest.position
        captures: list[Capture] = []
        for position in positions:
            if not inner.has(name_of(position), sequence.born):
                value = worth(sequence.inside[position], position - last, age=0)
                slot = self.places.find_inner_slot(value)
                if slot is None:
                    continue
                captures.append(Capture(position, slot))
            last = position
        return captures

    def _free_contained(self, sequence: Sequence, position: int) -> None:
        """A longer one makes shorter ones needless, unless others are about to go on from there."""
        awaited = self.followers.splits(sequence)
        residents = self._residents_of(sequence)
        for branch in residents.take_contained(sequence.tokens[:position], awaited):
            self.places.free(branch)

    def _least_urgent(self) -> Sequence:
        """Idle work, if any runs; else the youngest sequence."""
        return next((s for s in self.running if s.is_idle_work), self.running[-1])

    def _in_phase(self, phase: Phase) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.phase is phase]

    def _take_slot(self) -> int:
        slot = self.places.find_slot()
        assert slot is not None, "slots are reserved for max_sequences"
        return slot

    def _free_places(self, sequence: Sequence) -> None:
        sequence.stop_restoring()
        self.places.pages.give_back(sequence.pages)
        sequence.pages = ()
        for slot in {sequence.slot, sequence.mark_slot} - {-1}:
            self.places.give_back(slot)
        sequence.slot = sequence.mark_slot = -1


def _rank(sequence: Sequence) -> int:
    return sequence.rank


def _num_places(sequence: Sequence) -> int:
    """Pages for all known tokens, and one so that the first decoded page preempts nobody."""
    return sequence.num_pages_needed + 1
