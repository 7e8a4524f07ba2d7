"""Ended sequences whose pages stay on the device: taken over whole, given up for others."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from tape_harness import TapeHarness, small_limits
from tape_model import continuation

from daemon.checkpoint import Boundary
from daemon.engine.requests import (
    Event,
    Finished,
    GenerationRequest,
    Priority,
    Started,
    TokenSampled,
)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def harness_of(
    max_residents: int = 4, *, store: MemoryStore | None = None, **limits: int
) -> TapeHarness:
    allowed = msgspec.structs.replace(small_limits(**limits), max_residents=max_residents)
    return TapeHarness(allowed, store)


def reply(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Finished), events
    return list(events[-1].tokens)


def talk(harness: TapeHarness, tokens: list[int], count: int = 70) -> tuple[list[int], Started]:
    events = harness.submit(tokens, max_tokens=count, boundaries=[len(tokens)])
    harness.run()
    started = events[0]
    assert isinstance(started, Started)
    assert reply(events) == continuation(tokens, count)
    return [*tokens, *reply(events)], started


def submit_idle(
    harness: TapeHarness, number: int, priority: Priority, tokens: list[int]
) -> list[Event]:
    events: list[Event] = []
    request = GenerationRequest(
        id=f"{priority} {number}",
        tokens=tuple(tokens),
        boundaries=(Boundary(len(tokens), "user"),),
        max_tokens=int(priority == "audit"),
        priority=priority,
    )
    harness.engine.add(request, events.append)
    return events


def settle(harness: TapeHarness) -> None:
    """Until nobody waits for anything."""
    while any(not sequence.is_idle_work for sequence in harness.engine.sequences.values()):
        harness.step()
    harness.step()


def test_the_next_turn_takes_the_newest_residents_place_and_an_audit_does_not() -> None:
    harness = harness_of(num_pages=20, store=MemoryStore())
    talk(harness, prompt(650), count=1)
    (resident,) = harness.scheduler.places.residents._residents
    audit = submit_idle(harness, 0, "audit", prompt(700))
    for _ in range(20):
        harness.step()
    assert audit == []
    assert harness.scheduler.places.residents._residents == [resident]
    ahead = submit_idle(harness, 0, "next", prompt(700, seed=1))
    while not any(isinstance(event, Finished) for event in ahead):
        harness.step()
    assert [r.branch.position for r in harness.scheduler.places.residents._residents] == [640]


def test_the_next_request_goes_on_without_a_copy() -> None:
    harness = harness_of(store=MemoryStore())
    history, _ = talk(harness, prompt(150))
    assert len(history) == 220
    harness.model.begin_write = None  # type: ignore[method-assign,assignment]
    _, started = talk(harness, [*history, *prompt(30, seed=2)])
    assert started.num_cached_tokens == 192
    assert started.restored is not None
    assert (started.restored.tier, started.restored.born) == ("device", "decode")
    assert len(harness.scheduler.places.residents) == 1


def test_what_the_store_has_lost_is_not_remembered() -> None:
    store = MemoryStore()
    harness = harness_of(store=store)
    history, _ = talk(harness, prompt(150))
    store.states.clear()
    _, started = talk(harness, [*history, 1])
    assert started.num_cached_tokens == 0


def test_it_may_not_be_the_whole_prompt() -> None:
    harness = harness_of(store=MemoryStore())
    history, _ = talk(harness, prompt(150), count=43)
    assert len(history) == 193
    _, started = talk(harness, history[:192])
    assert started.num_cached_tokens < 192


def test_a_store_that_has_more_is_preferred_and_the_places_serve_all_the_same() -> None:
    store = MemoryStore()
    harness = harness_of(store=store)
    history, _ = talk(harness, prompt(100), count=30)
    other = harness_of(0, store=store)
    longer = [*history, *prompt(300, seed=3)]
    talk(other, longer)
    _, started = talk(harness, [*longer, 5])
    assert started.num_cached_tokens == 384
    assert started.restored is not None
    assert started.restored.tier != "device"


def test_strict_goes_on_only_from_what_prompt_evaluation_made() -> None:
    harness = harness_of(store=MemoryStore())
    harness.engine.restoring.strict = harness.scheduler.strict = True
    history, _ = talk(harness, prompt(150), count=10)
    _, started = talk(harness, [*history, 1])
    assert started.restored is not None
    assert (started.num_cached_tokens, started.restored.tier) == (128, "device")
    history, _ = talk(harness, prompt(150, seed=4), count=70)
    _, started = talk(harness, [*history, 1])
    assert started.restored is not None
    assert (started.num_cached_tokens, started.restored.tier) == (128, "disk")


def test_residents_give_way_to_who_needs_places() -> None:
    harness = harness_of(num_pages=12, max_sequences=1, store=MemoryStore())
    for seed in range(3):
        talk(harness, prompt(200, seed=seed))
    assert 0 < len(harness.scheduler.places.residents) < 3
    talk(harness, prompt(600, seed=9), count=90)
    residents = harness.scheduler.places.residents
    assert len(residents) == 1
    harness.scheduler.places.forget_all()
    harness.assert_all_places_are_free()


def test_another_request_does_not_take_a_resident_that_it_only_begins_like() -> None:
    harness = harness_of(store=MemoryStore())
    shared = prompt(130)
    main, _ = talk(harness, [*shared, *prompt(100, seed=1)])
    talk(harness, [*shared, *prompt(20, seed=2)])
    _, started = talk(harness, [*main, 3])
    assert started.num_cached_tokens == len(main) // 64 * 64


@pytest.mark.parametrize("read_steps", [0, 1, 7])
def test_snapshots_arrive_later_and_are_found_by_who_comes_next(read_steps: int) -> None:
    store = MemoryStore()
    harness = harness_of(0, store=store)
    harness.model.read_steps = read_steps
    tokens = prompt(200)
    first = harness.submit(tokens, max_tokens=3, boundaries=[128, 192])
    while not first or not isinstance(first[-1], Finished):
        harness.step()
    second = harness.submit([*tokens, 1], max_tokens=3)
    harness.run()
    assert isinstance(second[0], Started)
    assert second[0].num_cached_tokens == 192
    assert {len(pages[0]) for pages in store.pages} == {64, 128, 192}
    harness.assert_all_places_are_free()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_of_conversations_gives_the_right_replies(data: st.DataObject) -> None:
    store = MemoryStore(interval=256) if data.draw(st.booleans()) else None
    harness = harness_of(
        data.draw(st.integers(1, 4)), store=store, num_pages=data.draw(st.integers(20, 40))
    )
    harness.model.read_steps = data.draw(st.integers(0, 5))
    harness.model.write_steps = data.draw(st.integers(0, 5))
    histories: list[list[int]] = [prompt(100, seed=seed) for seed in range(3)]
    audits: list[tuple[list[int], list[Event]]] = []
    for number in range(6):
        index = data.draw(st.integers(0, 2))
        cut = data.draw(st.sampled_from([None, 64, 128, 200]))
        asked = [*histories[index][:cut], *prompt(data.draw(st.integers(1, 150)), seed=50 + number)]
        count = data.draw(st.integers(1, 100))
        events = harness.submit(asked[:800], max_tokens=count, boundaries=[len(asked[:800])])
        if data.draw(st.booleans()):
            audits.append((asked[:800], submit_idle(harness, number, "audit", asked[:800])))
        if data.draw(st.booleans()):
            submit_idle(harness, number, "next", [*asked[:700], *prompt(64, seed=number)])
        if data.draw(st.booleans()):
            settle(harness)
            assert reply(events) == continuation(asked[:800], count)
            histories[index] = [*asked[:800], *reply(events)]
    settle(harness)
    for _ in range(data.draw(st.sampled_from([0, 30, 100]))):
        harness.step()
    for name in [name for name in harness.engine.sequences if name.startswith("audit")]:
        harness.engine.cancel(name)
    harness.run()
    for tokens, events in audits:
        sampled = [event.token for event in events if isinstance(event, TokenSampled)]
        assert sampled in ([], continuation(tokens, 1))
    harness.scheduler.places.forget_all()
    harness.assert_all_places_are_free()
