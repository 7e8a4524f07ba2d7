"""Checkpoints on their way to the device: who begins meanwhile, what a cancelled one leaves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from tape_harness import TapeHarness, small_limits
from tape_model import continuation

from daemon.engine.backends.backend import Writing
from daemon.engine.requests import Event, Finished, Started
from daemon.engine.sequence import Phase
from daemon.errors import DeviceError, DeviceLost

PROMPT = list(range(300))


def harness_with(store: MemoryStore | None = None, **limits: int) -> TapeHarness:
    """One whose store has PROMPT up to 256, where nothing lies on the device."""
    store = MemoryStore() if store is None else store
    first = TapeHarness(small_limits(), store)
    first.submit(PROMPT, max_tokens=2, boundaries=[256])
    first.run()
    return TapeHarness(small_limits(**limits), store)


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished), events
    return events[-1]


def num_cached(events: list[Event]) -> int:
    assert isinstance(events[0], Started)
    return events[0].num_cached_tokens


def test_a_prompt_begins_before_its_checkpoint_has_arrived() -> None:
    harness = harness_with()
    harness.model.write_steps = 3
    events = harness.submit(PROMPT, max_tokens=4)
    while not harness.model.batches:
        harness.step()
    [sequence] = harness.scheduler.running
    assert sequence.is_arriving
    harness.run()
    assert num_cached(events) == 256
    assert list(finished(events).tokens) == continuation(PROMPT, 4)


def test_who_decodes_does_not_stand_still_for_another_ones_checkpoint() -> None:
    harness = harness_with()
    decoding = harness.submit([7, 7, 7], max_tokens=30)
    harness.step()
    harness.model.write_steps = 5
    events = harness.submit(PROMPT, max_tokens=4)
    while not events:
        harness.step()
        assert harness.model.batches[-1].kind == "decode"
    arriving = next(s for s in harness.scheduler.running if s.tokens[:300] == PROMPT)
    while arriving.is_arriving:
        assert arriving.num_evaluated == 256
        assert harness.step()
    harness.run()
    assert list(finished(events).tokens) == continuation(PROMPT, 4)
    assert list(finished(decoding).tokens) == continuation([7, 7, 7], 30)


def test_a_cancelled_restore_leaves_its_places_to_others() -> None:
    store = MemoryStore()
    harness = harness_with(store, max_sequences=1, num_pages=8)
    harness.model.write_steps = 3
    harness.submit(PROMPT, max_tokens=4)
    harness.step()
    [sequence] = harness.scheduler.running
    writing = sequence.writing
    assert isinstance(writing, Writing)
    assert sequence.phase is Phase.RESTORING
    harness.engine.cancel("r0")
    assert writing.is_abandoned
    num_states = len(store.states)
    other = harness.submit([5] * 290, max_tokens=4)
    harness.run()
    assert list(finished(other).tokens) == continuation([5] * 290, 4)
    assert len(store.states) == num_states
    harness.assert_all_places_are_free()


def test_what_was_only_restored_is_not_saved_again_when_it_is_cancelled() -> None:
    harness = harness_with()
    harness.submit([7, 7, 7], max_tokens=90)
    harness.step()
    harness.model.write_steps = 20
    events = harness.submit(PROMPT, max_tokens=4)
    while not events:
        harness.step()
    harness.model.begin_read = None  # type: ignore[method-assign,assignment]
    harness.engine.cancel("r1")


def harness_that_fails(error: DeviceError) -> TapeHarness:
    """Where no checkpoint comes to the device."""
    harness = harness_with()

    def fail(*_: object) -> Writing:
        writing = Writing()
        writing.given.set_exception(error)
        return writing

    harness.model.begin_write = fail  # type: ignore[method-assign,assignment]
    return harness


def test_a_checkpoint_that_cannot_be_copied_is_evaluated_instead() -> None:
    harness = harness_that_fails(DeviceError("Could not copy to the GPU."))
    events = harness.submit(PROMPT, max_tokens=4)
    harness.run()
    assert num_cached(events) == 0
    assert list(finished(events).tokens) == continuation(PROMPT, 4)


def test_a_lost_device_ends_the_engine() -> None:
    harness = harness_that_fails(DeviceLost("The GPU is gone."))
    harness.submit(PROMPT, max_tokens=4)
    with pytest.raises(DeviceLost):
        harness.run()


def test_who_comes_while_a_checkpoint_is_saved_waits_for_it_and_others_do_not() -> None:
    harness = TapeHarness(store=MemoryStore())
    harness.model.read_steps = 9
    harness.submit(PROMPT, max_tokens=1, boundaries=[256])
    while harness.engine.sequences:
        harness.step()
    same = harness.submit([*PROMPT, 1], max_tokens=2)
    other = harness.submit([5] * 290, max_tokens=2)
    while not other:
        harness.step()
    assert not same
    harness.run()
    assert num_cached(same) == 256
    assert list(finished(same).tokens) == continuation([*PROMPT, 1], 2)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_timing_and_any_cancelling_gives_the_right_replies(data: st.DataObject) -> None:
    store = MemoryStore(interval=128)
    harness = TapeHarness(small_limits(num_pages=data.draw(st.integers(18, 40))), store)
    prompts = [[*PROMPT[: data.draw(st.integers(70, 300))], seed] for seed in range(3)]
    requests: list[tuple[list[int], list[Event]]] = []
    for number in range(data.draw(st.integers(3, 10))):
        harness.model.read_steps = data.draw(st.integers(0, 4))
        harness.model.write_steps = data.draw(st.integers(0, 4))
        asked = prompts[data.draw(st.integers(0, 2))]
        requests.append((asked, harness.submit(asked, max_tokens=70, boundaries=[len(asked)])))
        for _ in range(data.draw(st.integers(0, 30))):
            harness.step()
        if data.draw(st.booleans()):
            harness.engine.cancel(f"r{data.draw(st.integers(0, number))}")
    harness.run()
    for asked, events in requests:
        end = finished(events)
        assert end.reason == "cancelled" or list(end.tokens) == continuation(asked, 70)
    harness.assert_all_places_are_free()
