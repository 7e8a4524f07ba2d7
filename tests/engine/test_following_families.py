"""Prompts that come together and begin alike: what they share is evaluated once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from tape_harness import TapeHarness, small_limits
from tape_model import continuation

from daemon.engine.requests import Event, Finished, Started

SHARED = list(range(1000, 1330))


def reply(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Finished), events
    return list(events[-1].tokens)


def num_cached(events: list[Event]) -> int:
    assert isinstance(events[0], Started)
    return events[0].num_cached_tokens


def num_evaluated(harness: TapeHarness) -> int:
    prompts = [batch for batch in harness.model.batches if batch.kind == "prefill"]
    return sum(len(span.tokens) for batch in prompts for span in batch.spans)


@pytest.mark.parametrize("steps", [0, 1])
def test_siblings_wait_where_they_part_from_the_first(steps: int) -> None:
    harness = TapeHarness(small_limits(), MemoryStore())
    harness.model.read_steps = harness.model.write_steps = 2
    prompts = [[*SHARED, *[seed] * 100] for seed in range(3)]
    events = [harness.submit(prompts[0], max_tokens=5)]
    for _ in range(steps):
        harness.step()
    events += [harness.submit(prompt, max_tokens=5) for prompt in prompts[1:]]
    harness.run()
    assert [reply(each) for each in events] == [continuation(prompt, 5) for prompt in prompts]
    assert [num_cached(each) for each in events] == [0, 320, 320]
    assert num_evaluated(harness) == 430 + 2 * 110
    harness.assert_all_places_are_free()


def test_the_same_prompt_several_times_is_evaluated_once() -> None:
    harness = TapeHarness(small_limits(), MemoryStore())
    events = [harness.submit(SHARED, max_tokens=5) for _ in range(3)]
    harness.run()
    assert [reply(each) for each in events] == [continuation(SHARED, 5)] * 3
    assert num_evaluated(harness) == 330 + 2 * 10


def test_who_is_further_already_waits_for_nobody() -> None:
    store = MemoryStore()
    first = TapeHarness(small_limits(), store)
    first.submit(SHARED, max_tokens=1, boundaries=[256])
    first.run()
    harness = TapeHarness(small_limits(prefill_tokens=64), store)
    store_of_all, store.states = store.states, {}
    behind = harness.submit([*SHARED, 1], max_tokens=2)
    harness.step()
    store.states = store_of_all
    ahead = harness.submit([*SHARED, 2], max_tokens=2)
    while not ahead:
        harness.step()
    assert num_cached(ahead) == 256
    harness.run()
    assert reply(behind) == continuation([*SHARED, 1], 2)


def test_when_the_first_is_cancelled_the_next_takes_over() -> None:
    harness = TapeHarness(small_limits(prefill_tokens=64), MemoryStore())
    harness.submit([*SHARED, 0], max_tokens=2)
    events = [harness.submit([*SHARED, seed], max_tokens=2) for seed in (1, 2)]
    for _ in range(2):
        harness.step()
    assert len(harness.model.batches) == 2
    harness.engine.cancel("r0")
    harness.run()
    assert [reply(each) for each in events] == [continuation([*SHARED, n], 2) for n in (1, 2)]
    assert [num_cached(each) for each in events] == [128, 320]
    harness.assert_all_places_are_free()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_families_of_prompts_get_the_right_replies_whatever_happens(data: st.DataObject) -> None:
    limits = small_limits(
        num_pages=data.draw(st.integers(20, 45)),
        prefill_tokens=data.draw(st.sampled_from([64, 192])),
    )
    harness = TapeHarness(limits, MemoryStore(interval=data.draw(st.sampled_from([128, 1024]))))
    harness.model.read_steps = data.draw(st.integers(0, 3))
    harness.model.write_steps = data.draw(st.integers(0, 3))
    asked: list[tuple[list[int], int, list[Event]]] = []
    for number in range(data.draw(st.integers(2, 8))):
        tokens = [*SHARED[: data.draw(st.integers(1, 330))], *[7] * data.draw(st.integers(0, 90))]
        count = data.draw(st.integers(1, 80))
        asked.append((tokens, count, harness.submit(tokens, max_tokens=count)))
        for _ in range(data.draw(st.integers(0, 6))):
            harness.step()
        if data.draw(st.integers(0, 4)) == 0:
            harness.engine.cancel(f"r{data.draw(st.integers(0, number))}")
    harness.run()
    for tokens, count, events in asked:
        end = events[-1]
        assert isinstance(end, Finished)
        assert end.reason == "cancelled" or reply(events) == continuation(tokens, count)
    harness.assert_all_places_are_free()
