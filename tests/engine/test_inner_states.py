"""States inside messages: who goes on from them, who goes for want of room, and never wrongly."""

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from tape_harness import TapeHarness, small_limits
from tape_model import continuation

from daemon.checkpoint import Boundary, Reason
from daemon.engine.memory.inner_states import AGE, InnerState, InnerStates, inside, worth
from daemon.engine.memory.residents import Branch
from daemon.engine.requests import Event, Finished, GenerationRequest, Started

FAR = 10**6
"""A distance of stored checkpoints at which there are none."""


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def harness_of(num_inner_slots: int, **limits: int) -> TapeHarness:
    allowed = msgspec.structs.replace(
        small_limits(**limits), max_residents=2, num_inner_slots=num_inner_slots
    )
    return TapeHarness(allowed, MemoryStore(interval=FAR))


def add(
    harness: TapeHarness, tokens: list[int], heads: range = range(0), reason: Reason = "head"
) -> list[Event]:
    events: list[Event] = []
    harness.replies.append(events)
    request = GenerationRequest(
        id=f"r{len(harness.replies)}",
        tokens=tuple(tokens),
        boundaries=tuple(Boundary(place, reason) for place in heads),
        max_tokens=2,
    )
    harness.engine.add(request, events.append)
    return events


def ask(
    harness: TapeHarness, tokens: list[int], heads: range = range(0), reason: Reason = "head"
) -> Started:
    """A prompt with pages in the head of a tool's result, evaluated and answered rightly."""
    events = add(harness, tokens, heads, reason)
    harness.run()
    started, last = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(last, Finished)
    assert list(last.tokens) == continuation(tokens, 2)
    return started


def edited(tokens: list[int], at: int, length: int = 100) -> list[int]:
    return [*tokens[:at], *prompt(length, seed=at + 1)]


def test_an_edit_costs_what_lies_behind_the_page_before_it() -> None:
    harness = harness_of(num_inner_slots=20)
    history = prompt(900)
    ask(harness, history, range(64, 832, 64))
    started = ask(harness, edited(history, 500))
    assert started.num_cached_tokens == 448
    assert started.restored is not None
    assert (started.restored.tier, started.restored.reason) == ("device", "junction")


def test_what_was_gone_on_from_is_in_the_store() -> None:
    harness = harness_of(num_inner_slots=20)
    history = prompt(900)
    ask(harness, history, range(64, 832, 64))
    ask(harness, edited(history, 500))
    harness.scheduler.places.forget_all()
    started = ask(harness, edited(history, 500, length=120))
    assert started.num_cached_tokens == 448
    assert started.restored is not None
    assert started.restored.tier == "disk"


def test_after_a_wipe_nothing_is_gone_on_from() -> None:
    harness = harness_of(num_inner_slots=20)
    store = harness.engine.store
    assert isinstance(store, MemoryStore)
    history = prompt(900)
    ask(harness, history, range(64, 832, 64))
    store.states.clear()
    store.num_wipes += 1
    assert ask(harness, edited(history, 500)).num_cached_tokens == 0
    harness.scheduler.places.forget_all()
    harness.assert_all_places_are_free()


def test_strict_requests_go_on_from_none_that_decoding_bore() -> None:
    harness = harness_of(num_inner_slots=20)
    history = [*prompt(100), *continuation(prompt(100), 60)]
    events = harness.submit(history[:100], max_tokens=60)
    harness.run()
    assert isinstance(events[-1], Finished)
    more = [*history, *prompt(300, seed=3)]
    started = ask(harness, more, range(192, 448, 64))
    assert started.num_cached_tokens == 128
    inner = harness.scheduler.places.inner
    name = harness.engine.store.timeline(more, "").name
    assert inner.find(name, 320) is not None
    assert inner.find(name, 320, strict=True) is None


def test_when_there_are_too_many_they_thin_out() -> None:
    harness = harness_of(num_inner_slots=6, captures=1)
    history = prompt(1000)
    ask(harness, history, range(64, 960, 64))
    places = sorted(s.position for s in harness.scheduler.places.inner._states.values())
    assert len(places) == 6
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= 256


def test_heads_outlive_sections_and_new_conversations_those_left_long_ago() -> None:
    harness = harness_of(num_inner_slots=4, captures=1)
    old, new = prompt(600), prompt(600, seed=9)
    ask(harness, old, range(64, 320, 64))
    ask(harness, new, range(64, 320, 64), "section")
    assert ask(harness, edited(old, 300)).num_cached_tokens >= 128
    harness = harness_of(num_inner_slots=4, captures=1)
    ask(harness, old, range(64, 320, 64))
    for number in range(8 * AGE):
        ask(harness, prompt(10, seed=20 + number))
    ask(harness, new, range(64, 320, 64))
    assert ask(harness, edited(new, 300)).num_cached_tokens == 256
    assert ask(harness, edited(old, 300)).num_cached_tokens == 0


def test_who_needs_pages_gets_them() -> None:
    harness = harness_of(num_inner_slots=20, num_pages=18)
    ask(harness, prompt(900), range(64, 832, 64))
    assert ask(harness, prompt(950, seed=4)).num_cached_tokens == 0
    harness.scheduler.places.forget_all()
    harness.assert_all_places_are_free()


def test_one_that_is_worth_less_takes_nobodys_place() -> None:
    states = InnerStates()
    branch = Branch(pages=(0, 1, 2, 3), slot=0, born="prompt", num_grid_pages=4, trail=None,
                    holder="inner")  # fmt: skip
    states.add(b"a", branch, "head", before=None)
    assert states.take_lesser(worth("section", 64, age=0)) is None
    assert states.take_lesser(worth("head", 256, age=0)) is branch


def test_whose_predecessor_goes_saves_its_tokens_too() -> None:
    states, last = InnerStates(), None
    for pages in (1, 2, 3):
        branch = Branch(pages=tuple(range(pages)), slot=pages, born="prompt", num_grid_pages=pages,
                        trail=None, holder="inner")  # fmt: skip
        last = states.add(str(pages).encode(), branch, "head", before=last)
    states.take(b"2")
    assert isinstance(last, InnerState)
    assert last.num_saved == 128


def test_places_inside_are_whole_pages_of_two_reasons() -> None:
    boundaries = [Boundary(130, "section"), Boundary(192, "head"), Boundary(256, "tool")]
    assert inside(boundaries) == {128: "section", 192: "head"}


def test_prompts_of_one_step_share_the_slots() -> None:
    harness = harness_of(num_inner_slots=4, prefill_tokens=1024)
    prompts = [prompt(500, seed) for seed in range(3)]
    replies = [add(harness, tokens, range(64, 448, 64)) for tokens in prompts]
    for _ in range(4):
        harness.step()
        assert len(harness.scheduler.places.inner) <= 4
    harness.run()
    for tokens, events in zip(prompts, replies, strict=True):
        assert isinstance(events[-1], Finished)
        assert list(events[-1].tokens) == continuation(tokens, 2)


@settings(max_examples=40)
@given(data=st.data())
def test_any_edits_side_by_side_give_the_right_replies(data: st.DataObject) -> None:
    num_inner_slots = data.draw(st.integers(0, 12), label="slots")
    num_pages = data.draw(st.integers(17, 60), label="pages")
    harness = harness_of(num_inner_slots, num_pages=num_pages)
    conversations = [prompt(700, seed) for seed in range(2)]
    asked: list[tuple[list[int], list[Event]]] = []
    for _ in range(data.draw(st.integers(2, 8), label="requests")):
        tokens = data.draw(st.sampled_from(conversations))
        if data.draw(st.booleans(), label="edit"):
            tokens = edited(tokens, data.draw(st.integers(1, 699)), data.draw(st.integers(1, 300)))
            conversations.append(tokens)
        first = data.draw(st.integers(1, 12))
        heads = range(first * 64, len(tokens) // 64 * 64, 64)
        reason: Reason = data.draw(st.sampled_from(["head", "section"]))
        asked.append((tokens, add(harness, tokens, heads, reason)))
        for _ in range(data.draw(st.integers(0, 30), label="steps")):
            harness.step()
            assert len(harness.scheduler.places.inner) <= num_inner_slots
    harness.run()
    for tokens, events in asked:
        assert isinstance(events[-1], Finished)
        assert list(events[-1].tokens) == continuation(tokens, 2)
    harness.scheduler.places.forget_all()
    harness.assert_all_places_are_free()


def test_who_comes_when_the_split_is_passed_goes_on_from_the_place_before_it() -> None:
    harness = harness_of(num_inner_slots=20)
    tokens, events, late = prompt(900), list[Event](), list[Event]()
    boundaries = tuple(Boundary(place, "section") for place in range(64, 832, 64))
    harness.engine.add(
        GenerationRequest(id="a", tokens=tuple(tokens), boundaries=boundaries, max_tokens=2),
        events.append,
    )
    while harness.engine.sequences["a"].num_evaluated < 640:
        harness.step()
    follower = edited(tokens, 500)
    harness.engine.add(GenerationRequest(id="b", tokens=tuple(follower), max_tokens=2), late.append)
    harness.step()
    assert "a" in harness.engine.sequences, "the other one still runs"
    harness.run()
    started = late[0]
    assert isinstance(started, Started)
    assert started.num_cached_tokens == 448
    assert isinstance(late[-1], Finished)
    assert list(late[-1].tokens) == continuation(follower, 2)
