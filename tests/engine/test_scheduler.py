"""Who is evaluated next: the budget, the order, captures, preemption; no model at all."""

from collections.abc import Sequence as Items

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tape_harness import generation_request, small_limits

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.checkpointing import NoTimeline
from daemon.engine.scheduler import Limits, Scheduler, Work
from daemon.engine.sequence import Phase, Sequence


def waiting_sequence(number: int, length: int, positions: Items[int] = ()) -> Sequence:
    """Different tokens for each number."""
    first = 1000 * number
    request = generation_request(number, range(first, first + length))
    sequence = Sequence(request, lambda event: None, NoTimeline())
    sequence.positions = dict.fromkeys(positions, "user")
    return sequence


def admitted(scheduler: Scheduler, *sequences: Sequence) -> list[Sequence]:
    """Queued, admitted, and ready to be evaluated from the first token."""
    for sequence in sequences:
        scheduler.add(sequence)
    accepted = scheduler.admit()
    for sequence in accepted:
        sequence.phase = Phase.PREFILL
    return accepted


def done(scheduler: Scheduler, work: Work) -> None:
    """As the engine does after a batch; a prompt's end samples a token."""
    for sequence, span in zip(work.sequences, work.batch.spans, strict=True):
        sequence.num_evaluated = span.end
        scheduler.give_back(span.captures)
        if span.samples:
            sequence.append(7)
            sequence.phase = Phase.DECODE


def lengths(work: Work | None) -> list[int]:
    return [] if work is None else [len(span.tokens) for span in work.batch.spans]


# ── admission ─────────────────────────────────────────────────────────────────────────────────


def test_admission_is_in_order_and_bounded() -> None:
    scheduler = Scheduler(small_limits(max_sequences=2))
    queued = [waiting_sequence(i, 10) for i in range(4)]
    assert admitted(scheduler, *queued) == queued[:2]
    assert scheduler.admit() == []
    scheduler.remove(queued[0])
    assert scheduler.admit() == [queued[2]]


def test_a_long_prompt_is_not_overtaken() -> None:
    """The first in the queue waits for its pages, and nobody takes them meanwhile."""
    scheduler = Scheduler(small_limits(num_pages=6))
    first, long, short = (waiting_sequence(i, n) for i, n in enumerate((250, 250, 10)))
    assert admitted(scheduler, first, long, short) == [first]
    scheduler.remove(first)
    assert scheduler.admit() == [long]
    assert scheduler.admit() == []


def test_one_page_is_free_for_the_first_decoded_tokens() -> None:
    scheduler = Scheduler(small_limits(num_pages=4))
    (sequence,) = admitted(scheduler, waiting_sequence(0, 3 * PAGE_TOKENS))
    assert len(sequence.pages) == 4
    scheduler.remove(sequence)
    assert admitted(scheduler, waiting_sequence(1, 3 * PAGE_TOKENS + 1)) == []


def test_places_differ_and_come_back() -> None:
    scheduler = Scheduler(small_limits())
    accepted = admitted(scheduler, *(waiting_sequence(i, 100) for i in range(3)))
    slots = [slot for each in accepted for slot in (each.slot, each.mark_slot)]
    assert len(set(slots)) == 6
    for sequence in accepted:
        scheduler.remove(sequence)
        assert sequence.pages == ()
    assert scheduler.places.pages.num_free == scheduler.limits.num_pages
    assert scheduler.places.slots.num_free == scheduler.limits.num_slots


def test_the_queue_says_when_it_is_full() -> None:
    scheduler = Scheduler(Limits(1, 2, 64, 10, 1))
    for i in range(2):
        assert not scheduler.is_full
        scheduler.add(waiting_sequence(i, 10))
    assert scheduler.is_full


@pytest.mark.parametrize("phase", list(Phase))
def test_removal_in_every_phase(phase: Phase) -> None:
    scheduler = Scheduler(small_limits())
    sequence = waiting_sequence(0, 100)
    scheduler.add(sequence)
    if phase is not Phase.WAITING:
        scheduler.admit()
        sequence.phase = phase
    scheduler.remove(sequence)
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.places.pages.num_free == scheduler.limits.num_pages
    assert scheduler.places.slots.num_free == scheduler.limits.num_slots


# ── prompts ───────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_is_cut_on_the_grid() -> None:
    scheduler = Scheduler(small_limits(prefill_tokens=128))
    admitted(scheduler, waiting_sequence(0, 300))
    seen = []
    while (work := scheduler.plan_prefill()) is not None:
        (span,) = work.batch.spans
        seen.append((span.start, span.end, span.samples))
        done(scheduler, work)
    assert seen == [(0, 128, False), (128, 256, False), (256, 300, True)]


def test_each_prompt_has_a_share_of_the_budget() -> None:
    scheduler = Scheduler(small_limits(prefill_tokens=256))
    admitted(scheduler, *(waiting_sequence(i, 500) for i in range(3)))
    assert lengths(scheduler.plan_prefill()) == [128, 64, 64]


def test_a_short_prompt_leaves_its_share_to_others() -> None:
    scheduler = Scheduler(small_limits(prefill_tokens=256))
    admitted(scheduler, waiting_sequence(0, 10), waiting_sequence(1, 500))
    assert lengths(scheduler.plan_prefill()) == [10, 192]


@given(
    prompts=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    budget=st.sampled_from([64, 128, 512]),
    captures=st.integers(1, 3),
    data=st.data(),
)
def test_every_prompt_ends_within_its_budget(
    prompts: list[int], budget: int, captures: int, data: st.DataObject
) -> None:
    """Every step keeps the budget, has no empty span, moves on, and captures what is wanted."""
    scheduler = Scheduler(Limits(5, 64, budget, 60, captures))
    sequences = []
    for number, length in enumerate(prompts):
        pages = st.integers(1, max(length // PAGE_TOKENS, 1))
        wanted = data.draw(st.sets(pages.map(lambda page: page * PAGE_TOKENS)))
        wanted = {position for position in wanted if position <= length}
        sequences.append(waiting_sequence(number, length, sorted(wanted)))
    admitted(scheduler, *sequences)
    captured: dict[str, list[int]] = {}
    for _ in range(sum(length // PAGE_TOKENS + 1 for length in prompts)):
        work = scheduler.plan_prefill()
        if work is None:
            break
        assert sum(span.num_chunks for span in work.batch.spans) * PAGE_TOKENS <= budget
        assert all(len(span.tokens) for span in work.batch.spans)
        for sequence, span in zip(work.sequences, work.batch.spans, strict=True):
            found = captured.setdefault(sequence.request.id, [])
            found += [capture.position for capture in span.captures]
        done(scheduler, work)
    assert all(sequence.phase is Phase.DECODE for sequence in sequences)
    for sequence in sequences:
        assert captured[sequence.request.id] == sorted(sequence.positions)
    assert scheduler.places.slots.num_free == scheduler.limits.num_slots - 2 * len(sequences)


# ── decoding ──────────────────────────────────────────────────────────────────────────────────


def decoding(scheduler: Scheduler, *prompts: int) -> list[Sequence]:
    sequences = admitted(scheduler, *(waiting_sequence(i, n) for i, n in enumerate(prompts)))
    while (work := scheduler.plan_prefill()) is not None:
        done(scheduler, work)
    return sequences


def test_all_decode_together_one_token_each() -> None:
    scheduler = Scheduler(small_limits())
    sequences = decoding(scheduler, 10, 64, 65)
    work = scheduler.plan_decode()
    assert work is not None
    assert work.sequences == tuple(sequences)
    assert lengths(work) == [1, 1, 1]
    assert [span.start for span in work.batch.spans] == [10, 64, 65]
    assert scheduler.plan_prefill() is None


def test_the_youngest_gives_way_when_pages_run_out() -> None:
    scheduler = Scheduler(small_limits(num_pages=4))
    old, young = decoding(scheduler, 64, 64)
    for _ in range(64):
        assert scheduler.make_room() is None
        work = scheduler.plan_decode()
        assert work is not None
        assert work.sequences == (old, young)
        done(scheduler, work)
    assert scheduler.make_room() is young
    scheduler.preempt(young)
    assert scheduler.make_room() is None
    work = scheduler.plan_decode()
    assert work is not None
    assert work.sequences == (old,)
    assert young.phase is Phase.WAITING
    assert young.num_evaluated == 0
    assert young.pages == ()
    assert scheduler.waiting[0] is young
    assert scheduler.admit() == []
    scheduler.remove(old)
    assert scheduler.admit() == [young]


def test_the_preempted_goes_before_those_who_wait() -> None:
    scheduler = Scheduler(small_limits(max_sequences=2))
    first, second = decoding(scheduler, 64, 64)
    later = waiting_sequence(2, 10)
    scheduler.add(later)
    scheduler.preempt(second)
    assert list(scheduler.waiting) == [second, later]
    assert scheduler.admit() == [second]
    assert scheduler.running == [first, second]
