"""Work that nobody waits for: it runs when nothing else does, gives way, and loses nothing."""

import random

from memory_store import MemoryStore
from tape_harness import TapeHarness, generation_request, small_limits
from tape_model import continuation

from daemon.checkpoint import Boundary, Found
from daemon.engine.requests import (
    Deliver,
    Event,
    Finished,
    GenerationRequest,
    Priority,
    Started,
    TokenSampled,
)
from daemon.engine.scheduler import IDLE_STEP_TOKENS, MAX_IDLE
from daemon.engine.sequence import PRIORITIES


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def submit_idle(
    harness: TapeHarness,
    name: str,
    tokens: list[int],
    *ends: int,
    priority: Priority = "next",
) -> list[Event]:
    events: list[Event] = []
    request = GenerationRequest(
        id=name,
        tokens=tuple(tokens),
        boundaries=tuple(Boundary(end, "user") for end in ends),
        max_tokens=1 if priority == "audit" else 0,
        probe=priority == "audit",
        priority=priority,
    )
    harness.engine.add(request, events.append)
    return events


def positions(store: MemoryStore, born: str = "prompt") -> list[int]:
    return sorted(len(tokens) for tokens, birth in store.states if birth == born)


def test_it_ends_at_its_last_boundary_and_samples_nothing() -> None:
    store = MemoryStore()
    harness = TapeHarness(store=store)
    events = submit_idle(harness, "ahead", prompt(400), 100, 250)
    harness.run()
    assert events[0] == Started(400, 0)
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.reason, end.tokens) == ("length", ())
    assert positions(store) == [64, 192]
    assert max(span.end for batch in harness.model.batches for span in batch.spans) == 192
    harness.assert_all_places_are_free()


def test_a_prompt_with_nothing_to_keep_is_not_evaluated() -> None:
    store = MemoryStore()
    harness = TapeHarness(store=store)
    for _ in range(2):
        events = submit_idle(harness, "ahead", prompt(200), 128)
        harness.run()
        assert isinstance(events[-1], Finished)
    assert [batch.kind for batch in harness.model.batches] == ["prefill"]
    assert events[0] == Started(200, 128, Found(128, "prompt", "user"))


def test_it_waits_for_clients_and_gives_way_after_one_small_step() -> None:
    harness = TapeHarness(small_limits(prefill_tokens=1024), MemoryStore())
    submit_idle(harness, "ahead", prompt(1000), 960)
    harness.engine.step()
    assert len(harness.model.batches[0].spans[0].tokens) == IDLE_STEP_TOKENS
    tokens = prompt(100, seed=1)
    client = harness.submit(tokens, max_tokens=5)
    while not isinstance(client[-1:] and client[-1], Finished):
        harness.engine.step()
    assert {len(batch.spans) for batch in harness.model.batches} == {1}
    harness.run()
    assert list(client[-1].tokens) == continuation(tokens, 5)
    spans = [batch.spans[0] for batch in harness.model.batches]
    assert [(span.start, span.end) for span in (spans[0], spans[-1])] == [(0, 256), (768, 960)]
    harness.assert_all_places_are_free()


def test_a_request_takes_its_places_and_the_work_goes_on_from_where_it_was() -> None:
    store = MemoryStore()
    harness = TapeHarness(small_limits(max_sequences=1, num_pages=20), store)
    idle = submit_idle(harness, "ahead", prompt(1000), 960)
    harness.engine.step()
    assert positions(store) == []
    harness.submit(prompt(100, seed=1), max_tokens=3)
    harness.run()
    assert 128 in positions(store), "what was interrupted is kept"
    assert 960 in positions(store)
    evaluated = sum(len(s.tokens) for b in harness.model.batches for s in b.spans)
    assert evaluated == 960 + 100 + 2
    assert isinstance(idle[-1], Finished)
    harness.assert_all_places_are_free()


def test_newer_work_replaces_what_it_contains_and_the_oldest_of_too_many_goes() -> None:
    harness = TapeHarness(store=MemoryStore())
    tokens = prompt(300)
    old = submit_idle(harness, "old", tokens[:200], 128)
    other = submit_idle(harness, "other", prompt(200, seed=9), 128)
    submit_idle(harness, "new", tokens, 256)
    assert [event.reason for event in old if isinstance(event, Finished)] == ["cancelled"]
    for number in range(MAX_IDLE):
        submit_idle(harness, f"more {number}", prompt(200, seed=10 + number), 128)
    assert [event.reason for event in other if isinstance(event, Finished)] == ["cancelled"]
    harness.run()
    harness.assert_all_places_are_free()


def test_a_reply_gets_its_canonical_twin_when_the_device_is_idle() -> None:
    store = MemoryStore()
    harness = TapeHarness(store=store, canonical=True)
    tokens = prompt(150)
    harness.submit(tokens, max_tokens=200, boundaries=[140])
    harness.run()
    end = (150 + 200 - 1) // 64 * 64
    assert positions(store, "decode") == [end]
    assert positions(store) == [128, end]
    harness.assert_all_places_are_free()


def test_what_was_built_on_a_decoded_state_becomes_canonical_too() -> None:
    store = MemoryStore()
    harness = TapeHarness(store=store, canonical=True)
    tokens = prompt(150)
    harness.engine.add(generation_request(100, tokens, 100), lambda event: None)
    while harness.engine.sequences.keys() != {"r100-canonical"}:
        harness.engine.step()
    longer = [*tokens, *continuation(tokens, 100), *prompt(100, seed=3)]
    harness.submit(longer, max_tokens=100, boundaries=[320])
    harness.run()
    assert 320 in positions(store, "decode")
    assert 320 in positions(store)
    harness.assert_all_places_are_free()


def test_the_next_turn_comes_before_twins_and_those_before_audits() -> None:
    for max_sequences in (1, 3):
        harness = TapeHarness(small_limits(max_sequences), MemoryStore())
        ends: list[str] = []
        for seed, priority in enumerate(PRIORITIES[:0:-1]):
            events = submit_idle(harness, priority, prompt(600, seed=seed), 576, priority=priority)
            harness.engine.sequences[priority].deliver = _noting(ends, priority, events)
            harness.engine.step()
        harness.run()
        assert ends == ["next", "canonical", "audit"]
        harness.assert_all_places_are_free()


def _noting(ends: list[str], name: str, events: list[Event]) -> Deliver:
    def deliver(event: Event) -> None:
        events.append(event)
        if isinstance(event, Finished):
            ends.append(name)

    return deliver


def test_of_too_many_the_least_urgent_go_and_audits_that_began_stay() -> None:
    harness = TapeHarness(store=MemoryStore())
    half = MAX_IDLE // 2 + 1
    audits = [
        submit_idle(harness, f"audit {n}", prompt(100, seed=n), priority="audit")
        for n in range(half)
    ]
    ahead = [submit_idle(harness, f"next {n}", prompt(100, seed=99 + n), 64) for n in range(half)]
    harness.run()
    reasons = [events[-1].reason for events in audits if isinstance(events[-1], Finished)]
    assert reasons == ["length"] * (half - 2) + ["cancelled"] * 2
    assert all(not isinstance(e, Finished) or e.reason == "length" for es in ahead for e in es)


def test_a_stop_drops_idle_work_and_keeps_that_of_clients() -> None:
    store = MemoryStore()
    harness = TapeHarness(small_limits(prefill_tokens=1024), store)
    submit_idle(harness, "ahead", prompt(1000), 960)
    harness.engine.step()
    harness.engine.stop()
    assert not store.states
    tokens = prompt(900, seed=1)
    client = harness.submit(tokens, max_tokens=70)
    while not any(isinstance(event, TokenSampled) for event in client):
        harness.engine.step()
    for _ in range(66):
        harness.engine.step()
    harness.engine.stop()
    assert positions(store, "decode") == [960]
    harness.assert_all_places_are_free()
