"""The engine over a model that notices every wrong place: events, ends, failures, any order."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from tape_harness import CONTEXT, TapeHarness, assert_in_order, small_limits
from tape_model import continuation

from daemon.checkpoint import PAGE_TOKENS, Found
from daemon.engine.batch import Batch
from daemon.engine.requests import Event, Failed, Finished, Progress, Started, TokenSampled
from daemon.errors import DeviceError


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


# ── the end of a reply ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 300])
def test_events_of_one_request(length: int) -> None:
    harness = TapeHarness()
    tokens = prompt(length)
    events = harness.submit(tokens, max_tokens=70)
    harness.run()
    expected = continuation(tokens, 70)
    assert events[0] == Started(length, 0)
    steps = [event for event in events if isinstance(event, Progress)]
    edges = [*range(128, length, 128), length]
    assert steps == [Progress(edge, length) for edge in edges]
    sampled = [event for event in events if isinstance(event, TokenSampled)]
    assert sampled == [TokenSampled(token) for token in expected]
    end = finished(events)
    assert (end.reason, end.tokens) == ("length", tuple(expected))
    assert (end.num_prompt_tokens, end.num_cached_tokens) == (length, 0)
    assert_in_order(events)
    harness.assert_all_places_are_free()


@pytest.mark.parametrize("overlaps", [False, True])
def test_tokens_are_delivered_while_the_device_has_work(overlaps: bool) -> None:
    """A device that computes by itself gets its next step first; another would hold tokens up."""
    harness = TapeHarness()
    harness.model.overlaps = overlaps
    tokens = prompt(20)
    events = harness.submit(tokens, max_tokens=4)
    num_seen: list[int] = []
    harness.model.before_batch = lambda batch: num_seen.append(len(events))
    harness.run()
    # Started comes before the first batch, progress and a token from it, a token from each other.
    assert num_seen == ([0, 1, 3, 4] if overlaps else [1, 3, 4, 5])
    assert [e.token for e in events if isinstance(e, TokenSampled)] == continuation(tokens, 4)
    assert_in_order(events)


@pytest.mark.parametrize("stop_at", [0, 1, 5])
def test_a_stop_token_ends_the_reply_and_is_not_part_of_it(stop_at: int) -> None:
    harness = TapeHarness()
    tokens = prompt(20)
    expected = continuation(tokens, 8)
    events = harness.submit(tokens, max_tokens=8, stop_tokens=[expected[stop_at]])
    harness.run()
    assert finished(events).reason == "stop"
    assert finished(events).tokens == tuple(expected[:stop_at])
    assert_in_order(events)


def test_a_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    harness = TapeHarness()
    tokens = prompt(20)
    expected = continuation(tokens, 3)
    events = harness.submit(tokens, max_tokens=3, stop_tokens=[expected[2]])
    harness.run()
    assert finished(events).reason == "stop"
    assert finished(events).tokens == tuple(expected[:2])


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    harness = TapeHarness()
    tokens = prompt(20)
    events = harness.submit(tokens, max_tokens=3, stop_tokens=[tokens[-1]])
    harness.run()
    assert len(finished(events).tokens) == 3


def test_the_context_ends_a_reply() -> None:
    harness = TapeHarness()
    tokens = prompt(CONTEXT - 5)
    events = harness.submit(tokens, max_tokens=100)
    harness.run()
    assert finished(events).reason == "length"
    assert finished(events).tokens == tuple(continuation(tokens, 5))


def test_one_token_is_sampled_without_decoding() -> None:
    harness = TapeHarness()
    events = harness.submit(prompt(30), max_tokens=1)
    harness.run()
    assert len(finished(events).tokens) == 1
    assert [batch.kind for batch in harness.model.batches] == ["prefill"]


# ── cancelling ────────────────────────────────────────────────────────────────────────────────


def test_cancel_while_waiting() -> None:
    harness = TapeHarness(small_limits(max_sequences=1))
    first = harness.submit(prompt(300), max_tokens=3)
    second = harness.submit(prompt(20), max_tokens=3)
    harness.engine.step()
    harness.engine.cancel("r1")
    assert [finished(second).reason, len(second)] == ["cancelled", 1]
    harness.run()
    assert len(finished(first).tokens) == 3
    harness.assert_all_places_are_free()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
def test_cancel_after_some_steps(steps: int) -> None:
    harness = TapeHarness()
    tokens = prompt(300)
    events = harness.submit(tokens, max_tokens=20)
    for _ in range(steps):
        harness.engine.step()
    harness.engine.cancel("r0")
    assert finished(events).reason == "cancelled"
    assert finished(events).tokens == tuple(continuation(tokens, max(steps - 2, 0)))
    assert_in_order(events)
    harness.assert_all_places_are_free()
    assert harness.engine.step() is False


def test_a_slow_prompt_is_kept_on_its_way() -> None:
    store = MemoryStore()
    harness = TapeHarness(store=store)
    harness.engine.keep_every_ms = -1.0
    tokens = prompt(500)
    harness.submit(tokens, max_tokens=2)
    for _ in range(4):
        harness.engine.step()
    kept = sorted((len(tokens), reason) for (tokens, _), (_, reason) in store.states.items())
    assert kept == [(128, "interrupted"), (256, "interrupted"), (384, "interrupted")]
    harness.run()
    harness.assert_all_places_are_free()


def test_cancel_of_an_unknown_or_ended_request_is_ignored() -> None:
    harness = TapeHarness()
    events = harness.submit(prompt(5), max_tokens=1)
    harness.run()
    harness.engine.cancel("r0")
    harness.engine.cancel("never")
    assert len([event for event in events if isinstance(event, Finished)]) == 1


# ── a failing device ──────────────────────────────────────────────────────────────────────────


def test_a_failed_batch_ends_its_own_requests_only() -> None:
    """The decoding ones are in another batch than the prompt that fails."""
    harness = TapeHarness()
    tokens = prompt(20)
    healthy = harness.submit(tokens, max_tokens=30)
    harness.engine.step()
    doomed = harness.submit(prompt(200, seed=1), boundaries=[64, 128])

    def fail_prompts(batch: Batch) -> None:
        if batch.kind == "prefill":
            raise DeviceError("no")

    harness.model.before_batch = fail_prompts
    harness.run()
    assert isinstance(doomed[-1], Failed)
    assert str(doomed[-1].error) == "no"
    assert finished(healthy).tokens == tuple(continuation(tokens, 30))
    harness.assert_all_places_are_free()
    harness.model.before_batch = lambda batch: None
    again = harness.submit(tokens)
    harness.run()
    assert finished(again).tokens == tuple(continuation(tokens, 8))


def test_a_failed_decode_leaves_a_waiting_prompt_alone() -> None:
    harness = TapeHarness(small_limits(max_sequences=1))
    doomed = harness.submit(prompt(20), max_tokens=30)
    tokens = prompt(30, seed=1)
    waiting = harness.submit(tokens, max_tokens=1)

    def fail_decode(batch: Batch) -> None:
        if batch.kind == "decode":
            raise DeviceError("no")

    harness.model.before_batch = fail_decode
    harness.run()
    assert isinstance(doomed[-1], Failed)
    assert_in_order(doomed)
    assert finished(waiting).tokens == tuple(continuation(tokens, 1))


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────


def test_what_is_cached_is_reported_and_not_evaluated() -> None:
    store = MemoryStore()
    tokens = prompt(300)
    first = TapeHarness(store=store)
    first.submit(tokens, boundaries=[64, 256])
    first.run()
    second = TapeHarness(store=store)
    events = second.submit(tokens, max_tokens=4)
    second.run()
    assert events[0] == Started(300, 256, Found(256, "prompt", "user"))
    assert finished(events).num_cached_tokens == 256
    assert finished(events).tokens == tuple(continuation(tokens, 4))
    prefills = [batch for batch in second.model.batches if batch.kind == "prefill"]
    assert sum(len(span.tokens) for batch in prefills for span in batch.spans) == 44


def test_the_same_prompt_again_evaluates_at_least_one_token() -> None:
    store = MemoryStore()
    tokens = prompt(128)
    for _ in range(2):
        harness = TapeHarness(store=store)
        events = harness.submit(tokens, boundaries=[64, 128], max_tokens=2)
        harness.run()
    assert events[0] == Started(128, 64, Found(64, "prompt", "user"))
    assert finished(events).tokens == tuple(continuation(tokens, 2))


# ── any order ─────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_requests_in_any_order(data: st.DataObject) -> None:
    """Sharing prefixes, cancelled, preempted, resumed: every reply is right, nothing is lost."""
    limits = small_limits(
        max_sequences=data.draw(st.integers(1, 4)),
        num_pages=data.draw(st.integers(10, 30)),
        prefill_tokens=data.draw(st.sampled_from([64, 128, 320])),
        captures=data.draw(st.integers(1, 3)),
    )
    store = MemoryStore(interval=data.draw(st.sampled_from([64, 192, 1024])))
    harness = TapeHarness(limits, store)
    stem = prompt(300)
    expected, cancelled = [], set()
    for number in range(data.draw(st.integers(1, 8))):
        kept = data.draw(st.integers(0, 300))
        own = prompt(data.draw(st.integers(1, 150)), seed=number + 1)
        max_tokens = data.draw(st.integers(1, 100))
        boundaries = data.draw(st.lists(st.integers(1, 4).map(lambda i: i * PAGE_TOKENS)))
        boundaries = [position for position in boundaries if position <= kept + len(own)]
        harness.submit(stem[:kept] + own, max_tokens=max_tokens, boundaries=boundaries)
        expected.append(continuation(stem[:kept] + own, max_tokens))
        for _ in range(data.draw(st.integers(0, 30))):
            harness.engine.step()
        if data.draw(st.integers(0, 4)) == 0:
            harness.engine.cancel(f"r{number}")
            cancelled.add(number)
    harness.run()
    for number, events in enumerate(harness.replies):
        tokens = list(finished(events).tokens)
        assert tokens == expected[number][: len(tokens)]
        assert number in cancelled or len(tokens) == len(expected[number])
        assert_in_order(events)
    harness.assert_all_places_are_free()
