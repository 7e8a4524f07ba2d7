"""Requests that go on from what another one in flight evaluates: once, whoever comes and goes."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from tape_harness import TapeHarness, generation_request, small_limits
from tape_model import continuation

from daemon.checkpoint import PAGE_TOKENS, Boundary
from daemon.engine.batch import Batch
from daemon.engine.following import Followers, is_worth_waiting
from daemon.engine.requests import Event, Failed, Finished, GenerationRequest, Started
from daemon.engine.scheduler import IDLE_STEP_TOKENS
from daemon.engine.sequence import Phase, Sequence
from daemon.errors import DeviceError


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def harness_of(
    max_residents: int = 6, *, store: MemoryStore | None = None, **limits: int
) -> TapeHarness:
    allowed = msgspec.structs.replace(small_limits(**limits), max_residents=max_residents)
    return TapeHarness(allowed, MemoryStore() if store is None else store)


def num_common(one: list[int], other: list[int]) -> int:
    """Tokens of the whole pages that both begin with."""
    size = min(len(one), len(other))
    first = next((i for i in range(size) if one[i] != other[i]), size)
    return first // PAGE_TOKENS * PAGE_TOKENS


def started(events: list[Event]) -> Started:
    assert isinstance(events[0], Started), events
    return events[0]


def check_reply(events: list[Event], tokens: list[int], count: int) -> None:
    assert isinstance(events[-1], Finished), events[-1]
    assert list(events[-1].tokens) == continuation(tokens, count)


def num_evaluated(harness: TapeHarness) -> int:
    """Tokens of prompts."""
    prefills = [batch for batch in harness.model.batches if batch.kind == "prefill"]
    return sum(len(span.tokens) for batch in prefills for span in batch.spans)


def free_everything(harness: TapeHarness) -> None:
    harness.scheduler.places.forget_all()
    harness.assert_all_places_are_free()


# ── when to wait ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_saved", "num_ahead", "worth"),
    [
        (64, 64, True),  # what it would evaluate itself meanwhile
        (64, 128, True),
        (64, 129, False),  # two steps for one page
        (128, 129, True),
        (0, 64, False),
        (640, 0, False),  # it is there already
    ],
)
def test_waiting_is_weighed_by_the_steps_it_takes(
    num_saved: int, num_ahead: int, worth: bool
) -> None:
    assert is_worth_waiting(num_saved, num_ahead, step_tokens=128) is worth


# ── two at once ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("max_residents", "tier"), [(6, "device"), (0, "disk")])
def test_what_two_share_is_evaluated_once(max_residents: int, tier: str) -> None:
    """Also where nothing may stay on the device: then the store has the junction."""
    store = MemoryStore()
    harness = harness_of(max_residents, store=store)
    shared = prompt(220)
    prompts = [[*shared, *prompt(200, seed=seed)] for seed in (1, 2)]
    leader, follower = [harness.submit(tokens, max_tokens=5) for tokens in prompts]
    harness.run()
    check_reply(leader, prompts[0], 5)
    check_reply(follower, prompts[1], 5)
    assert num_evaluated(harness) == 420 + 420 - 192
    assert started(leader).followed_ms is None
    told = started(follower)
    assert (told.num_cached_tokens, told.followed_ms is not None) == (192, True)
    assert told.restored is not None
    assert (told.restored.tier, told.restored.reason) == (tier, "junction")
    assert told.restored.born == "prompt"
    assert store.states[tuple(shared[:192]), "prompt"][1] == "junction"
    free_everything(harness)


def test_the_follower_begins_in_the_step_after_the_split_and_the_leader_goes_on() -> None:
    harness = harness_of()
    harness.model.read_steps = 50
    shared = prompt(128)
    harness.submit([*shared, *prompt(400, seed=1)], max_tokens=2)
    follower = harness.submit([*shared, *prompt(100, seed=2)], max_tokens=2)
    harness.step()
    assert [len(batch.spans) for batch in harness.model.batches] == [1]
    assert not follower
    harness.step()
    sizes = [len(batch.spans) for batch in harness.model.batches]
    assert sizes == [1, 2], "nobody waits for a save"
    harness.run()
    free_everything(harness)


def test_a_prompt_that_is_the_same_leaves_a_token_to_evaluate() -> None:
    harness = harness_of()
    tokens = prompt(256)
    events = [harness.submit(tokens, max_tokens=3) for _ in range(3)]
    harness.run()
    assert [started(each).num_cached_tokens for each in events] == [0, 192, 192]
    for each in events:
        check_reply(each, tokens, 3)


def test_without_a_store_nobody_waits() -> None:
    harness = TapeHarness(small_limits())
    tokens = prompt(200)
    events = [harness.submit(tokens, max_tokens=3) for _ in range(2)]
    harness.run()
    assert [started(each) for each in events] == [Started(200, 0)] * 2


def test_who_comes_later_goes_on_from_a_running_one() -> None:
    """The state that a decoding sequence holds is there for others before it ends."""
    harness = harness_of()
    shared = prompt(200)
    harness.submit([*shared, 1], max_tokens=60, boundaries=[192])
    while not any(batch.kind == "decode" for batch in harness.model.batches):
        harness.step()
    tokens = [*shared, 2, 3]
    later = harness.submit(tokens, max_tokens=4)
    harness.run()
    told = started(later)
    assert told.restored is not None
    assert (told.num_cached_tokens, told.restored.tier) == (192, "device")
    check_reply(later, tokens, 4)
    free_everything(harness)


def test_strict_requests_follow_too() -> None:
    harness = harness_of()
    harness.engine.restoring.strict = harness.scheduler.strict = True
    tokens = prompt(300)
    events = [harness.submit([*tokens, seed], max_tokens=3) for seed in range(2)]
    harness.run()
    assert started(events[1]).num_cached_tokens == 256


# ── several ───────────────────────────────────────────────────────────────────────────────────


def test_followers_of_followers() -> None:
    harness = harness_of(max_sequences=4)
    stem = prompt(400)
    cuts = [400, 150, 330, 400]
    prompts = [[*stem[:cut], *prompt(90, seed=cut + i)] for i, cut in enumerate(cuts)]
    prompts.append([*prompts[2][:400], *prompt(50, seed=77)])
    events = [harness.submit(tokens, max_tokens=3) for tokens in prompts]
    harness.run()
    cached = [started(each).num_cached_tokens for each in events]
    assert cached == [0, 128, 320, 384, 384]
    for each, tokens in zip(events, prompts, strict=True):
        check_reply(each, tokens, 3)
    free_everything(harness)


def test_others_are_not_held_up_by_who_waits() -> None:
    harness = harness_of(max_sequences=3)
    shared = prompt(640)
    harness.submit([*shared, 1], max_tokens=2)
    follower = harness.submit([*shared, 2], max_tokens=2)
    other = harness.submit(prompt(20, seed=9), max_tokens=2)
    while not other:
        harness.step()
    assert not follower
    harness.run()
    assert started(follower).num_cached_tokens == 640
    free_everything(harness)


def test_the_places_of_who_waits_are_kept() -> None:
    harness = harness_of(max_sequences=2, num_pages=30)
    shared = prompt(640)
    harness.submit([*shared, 1], max_tokens=20)
    follower = harness.submit([*shared, 2], max_tokens=2)
    other = harness.submit(prompt(20, seed=9), max_tokens=2)
    while not other:
        harness.step()
    assert isinstance(follower[-1], Finished)
    harness.run()
    free_everything(harness)


def test_who_has_no_place_yet_still_says_where_it_will_leave() -> None:
    harness = harness_of(max_sequences=1)
    shared = prompt(300)
    prompts = [[*shared, *prompt(150, seed=seed)] for seed in range(1, 5)]
    events = [harness.submit(tokens, max_tokens=20) for tokens in prompts]
    harness.run()
    assert [started(each).num_cached_tokens for each in events] == [0, 256, 256, 256]
    free_everything(harness)


# ── leaders that go ───────────────────────────────────────────────────────────────────────────


def test_a_cancelled_leader_leaves_what_it_has_done() -> None:
    harness = harness_of()
    shared = prompt(700)
    harness.submit([*shared, 1], max_tokens=5)
    tokens = [*shared, 2]
    follower = harness.submit(tokens, max_tokens=5)
    for _ in range(3):
        harness.step()
    harness.model.read_steps = 30
    harness.engine.cancel("r0")
    harness.step()
    told = started(follower)
    assert told.restored is not None
    assert (told.num_cached_tokens, told.restored.tier) == (384, "device")
    harness.run()
    check_reply(follower, tokens, 5)
    assert num_evaluated(harness) == 701
    free_everything(harness)


def test_a_leader_that_fails_releases_its_followers() -> None:
    harness = harness_of()
    shared = prompt(700)
    leader = harness.submit([*shared, 1], max_tokens=5)
    tokens = [*shared, 2]
    followers = [harness.submit(tokens, max_tokens=5) for _ in range(2)]

    def fail(batch: Batch) -> None:
        if len(harness.model.batches) == 2:
            harness.model.before_batch = lambda _: None
            raise DeviceError("no")

    harness.model.before_batch = fail
    harness.run()
    assert isinstance(leader[-1], Failed)
    for each in followers:
        check_reply(each, tokens, 5)
    assert num_evaluated(harness) == 256 + 701 + 61
    free_everything(harness)


def test_a_preempted_leader_leads_again() -> None:
    """It goes back to the head of the queue, and what it had done is kept."""
    harness = harness_of(max_sequences=3, num_pages=24)
    decoding = harness.submit(prompt(380, seed=5), max_tokens=500)
    while not harness.scheduler.plan_decode():
        harness.step()
    shared = prompt(700)
    leader = harness.submit([*shared, 1], max_tokens=5)
    follower = harness.submit([*shared, 2], max_tokens=5)
    for _ in range(3):
        harness.step()
    [victim] = [s for s in harness.scheduler.running if s.phase is Phase.PREFILL]
    harness.engine._keep_interrupted(victim)
    harness.scheduler.preempt(victim)
    harness.run()
    check_reply(leader, [*shared, 1], 5)
    check_reply(follower, [*shared, 2], 5)
    check_reply(decoding, prompt(380, seed=5), 500)
    assert num_evaluated(harness) - 380 <= 701 + 61
    free_everything(harness)


def test_a_follower_that_goes_leaves_the_leader_alone() -> None:
    harness = harness_of()
    shared = prompt(300)
    leader = harness.submit([*shared, 1], max_tokens=5)
    harness.submit([*shared, 2], max_tokens=5)
    harness.step()
    harness.engine.cancel("r1")
    harness.run()
    check_reply(leader, [*shared, 1], 5)
    free_everything(harness)


# ── idle work ─────────────────────────────────────────────────────────────────────────────────


def idle_work(harness: TapeHarness, tokens: list[int]) -> list[Event]:
    events: list[Event] = []
    request = GenerationRequest(
        id="ahead",
        tokens=tuple(tokens),
        boundaries=(Boundary(len(tokens), "user"),),
        max_tokens=0,
        priority="next",
    )
    harness.engine.add(request, events.append)
    return events


@pytest.mark.parametrize("max_sequences", [1, 3])
def test_a_request_takes_over_what_idle_work_has_done(max_sequences: int) -> None:
    harness = harness_of(max_sequences=max_sequences, prefill_tokens=1024)
    history = prompt(960)
    idle_work(harness, history)
    harness.step()
    harness.model.read_steps = 30
    tokens = [*history, 1, 2]
    events = harness.submit(tokens, max_tokens=5, boundaries=[960])
    harness.step()
    told = started(events)
    assert told.restored is not None
    assert (told.num_cached_tokens, told.restored.tier) == (IDLE_STEP_TOKENS, "device")
    harness.run()
    check_reply(events, tokens, 5)
    assert num_evaluated(harness) == 962
    free_everything(harness)


def test_idle_work_that_goes_another_way_stands_still_and_goes_on() -> None:
    harness = harness_of(prefill_tokens=1024)
    idle_work(harness, prompt(960))
    harness.step()
    harness.submit(prompt(100, seed=1), max_tokens=5)
    harness.run()
    assert num_evaluated(harness) == 960 + 100
    free_everything(harness)


# ── leads by themselves ───────────────────────────────────────────────────────────────────────


def sequence_of(number: int, tokens: list[int]) -> Sequence:
    timeline = MemoryStore().timeline(tokens, "")
    return Sequence(generation_request(number, tokens), lambda event: None, timeline)


def test_a_lead_is_given_up_when_the_leader_will_begin_behind_it() -> None:
    followers = Followers(step_tokens=128)
    shared = prompt(300)
    leader, follower = (sequence_of(i, [*shared, i]) for i in range(2))
    leader.phase = Phase.RESTORING
    followers.look([leader], [follower], lambda _: 0)
    assert list(followers) == [follower]
    assert leader.junctions == {256}
    leader.phase, leader.num_evaluated = Phase.PREFILL, 256
    followers.look([leader], [follower], lambda _: 0)
    assert list(followers) == []
    assert followers.splits(leader) == set()


def test_nobody_follows_one_behind_it_in_the_queue() -> None:
    followers = Followers(step_tokens=128)
    first, second = (sequence_of(i, [*prompt(300), i]) for i in range(2))
    followers.look([], [first, second], lambda _: 0)
    assert list(followers) == [second]
    followers.forget(first)
    followers.look([], [first, second], lambda _: 0)
    assert list(followers) == [second]


# ── any of it ─────────────────────────────────────────────────────────────────────────────────


def draw_prompts(data: st.DataObject, count: int) -> list[list[int]]:
    """Branches of branches."""
    prompts = [prompt(data.draw(st.integers(1, 500)))]
    for number in range(1, count):
        parent = prompts[data.draw(st.integers(0, number - 1))]
        kept = parent[: data.draw(st.integers(0, len(parent)))]
        prompts.append([*kept, *prompt(data.draw(st.integers(1, 200)), seed=number)])
    return prompts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_all_at_once_evaluate_the_union_of_their_prompts(data: st.DataObject) -> None:
    """Each evaluates what no earlier one begins with, from the grid on: at most the nodes of the
    trie of all prompts and 64 tokens for each of them, however few places there are."""
    harness = harness_of(
        data.draw(st.sampled_from([0, 1, 8])),
        max_sequences=data.draw(st.integers(1, 4)),
        num_pages=data.draw(st.integers(70, 80)),
        prefill_tokens=data.draw(st.sampled_from([64, 128, 320])),
        captures=data.draw(st.integers(1, 3)),
    )
    harness.model.read_steps = data.draw(st.integers(0, 4))
    harness.model.write_steps = data.draw(st.integers(0, 2))
    prompts = draw_prompts(data, data.draw(st.integers(1, 7)))
    events = [harness.submit(tokens, max_tokens=70) for tokens in prompts]
    harness.run()
    shared = 0
    for index, tokens in enumerate(prompts):
        limit = (len(tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS
        commons = [min(num_common(tokens, other), limit) for other in prompts[:index]]
        shared += max(commons, default=0)
        check_reply(events[index], tokens, 70)
    assert num_evaluated(harness) == sum(map(len, prompts)) - shared
    nodes = {tuple(tokens[:size]) for tokens in prompts for size in range(1, len(tokens) + 1)}
    assert len(nodes) <= num_evaluated(harness) <= len(nodes) + PAGE_TOKENS * len(prompts)
    free_everything(harness)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_coming_and_going_gives_the_right_replies(data: st.DataObject) -> None:
    """Few pages, cancelled leaders and followers, idle work between: nothing stands still."""
    harness = harness_of(
        data.draw(st.sampled_from([0, 2, 8])),
        store=MemoryStore(interval=data.draw(st.sampled_from([128, 1024]))),
        max_sequences=data.draw(st.integers(1, 4)),
        num_pages=data.draw(st.integers(18, 40)),
        prefill_tokens=data.draw(st.sampled_from([64, 128, 320])),
    )
    prompts = draw_prompts(data, data.draw(st.integers(2, 7)))
    replies: list[list[Event]] = []
    for number, tokens in enumerate(prompts):
        harness.model.read_steps = data.draw(st.integers(0, 4))
        harness.model.write_steps = data.draw(st.integers(0, 3))
        if data.draw(st.integers(0, 3)) == 0 and len(tokens) > PAGE_TOKENS:
            harness.engine.cancel("ahead")
            idle_work(harness, tokens)
        replies.append(harness.submit(tokens, max_tokens=data.draw(st.integers(1, 200))))
        for _ in range(data.draw(st.integers(0, 12))):
            harness.step()
        if data.draw(st.integers(0, 3)) == 0:
            harness.engine.cancel(f"r{data.draw(st.integers(0, number))}")
    while harness.engine.sequences.keys() - {"ahead"}:
        harness.step()
    # Idle work leaves the newest resident alone, and may wait for pages as long as nobody comes.
    harness.engine.cancel("ahead")
    harness.run()
    for tokens, events in zip(prompts, replies, strict=True):
        end = events[-1]
        assert isinstance(end, Finished)
        assert list(end.tokens) == continuation(tokens, 200)[: len(end.tokens)]
    free_everything(harness)
