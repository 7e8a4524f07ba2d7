"""Placement and the order of eviction: pure functions."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.policy import (
    AGE_US,
    WORTH,
    Candidate,
    Prompt,
    Ranked,
    Sizes,
    choose_victim,
    evaluation_cost,
    heat_after_use,
    keep_score,
    positions,
)
from daemon.checkpoint import PAGE_TOKENS, Boundary, Reason

REASONS = st.sampled_from(sorted(WORTH))
TINY = Sizes(state_bytes=1, page_bytes=1, budget_bytes=1 << 30, interval_tokens=1024)
LARGE = Sizes(state_bytes=150 << 20, page_bytes=34 << 16, budget_bytes=20 << 30)
"""A 27B model with q8_0 KV."""


def placed(
    num_tokens: int,
    *boundaries: tuple[int, Reason],
    start: int = 0,
    num_shared: int = 0,
    sizes: Sizes = TINY,
) -> dict[int, Reason]:
    prompt = Prompt(
        num_tokens=num_tokens,
        boundaries=[Boundary(*boundary) for boundary in boundaries],
        start=start,
        num_shared=num_shared,
    )
    return positions(prompt, sizes)


# ── placement ─────────────────────────────────────────────────────────────────────────────────


def test_boundaries_are_aligned_down_and_the_first_page_has_none() -> None:
    assert placed(500, (63, "system"), (64, "user")) == {64: "user"}


def test_a_page_that_ends_inside_the_generation_prompt_is_kept_for_short_replies() -> None:
    assert placed(260, (254, "prompt"))[256] == "reply"
    assert 256 not in placed(255, (250, "prompt"))
    assert placed(263, (257, "prompt"))[256] == "prompt"


def test_the_worthier_reason_is_recorded() -> None:
    wanted = placed(500, (130, "user"), (140, "system"), (150, "prompt"))
    assert wanted == {64: "interval", 128: "system"}


def test_a_page_before_a_prompts_end_is_kept_too() -> None:
    assert placed(895, (890, "prompt")) == {768: "interval", 832: "prompt"}


def test_cover_lies_where_boundaries_leave_room() -> None:
    wanted = placed(4096, (1000, "user"))
    assert wanted == {960: "user", 2048: "interval", 3072: "interval", 4096: "interval"}


def test_a_junction_lies_where_an_earlier_prompt_is_left() -> None:
    assert placed(900, (890, "user"), num_shared=640) == {640: "junction", 832: "user"}
    assert placed(900, (890, "user"), start=640, num_shared=640) == {832: "user"}
    assert placed(900, (640, "user"), num_shared=640) == {640: "user"}
    assert placed(900, num_shared=896) == {}, "the whole prompt is an earlier one's beginning"


def test_tool_results_thin_out_towards_the_start() -> None:
    ends = range(64, 6400, 64)
    wanted = placed(6400, *((end, "tool") for end in ends), sizes=LARGE)
    kept = sorted(6400 - position for position in wanted)
    assert kept[:5] == [64, 128, 192, 256, 384]
    gaps = [(far - near, far) for near, far in zip(kept, kept[1:], strict=False)]
    assert all(gap >= distance / 4 for gap, distance in gaps)
    assert len(kept) < 25


def test_a_few_tool_results_stay_however_far_back() -> None:
    wanted = placed(60_000, *((end, "tool") for end in (640, 1280, 1920)), sizes=LARGE)
    assert [position for position, reason in wanted.items() if reason == "tool"] == [
        640,
        1280,
        1920,
    ]


def test_sections_keep_their_distance_which_follows_the_size_of_a_state() -> None:
    places = [(position, "section") for position in range(64, 4000, 64)]
    assert (TINY.section_tokens, LARGE.section_tokens) == (128, 1024)
    wanted = placed(4000, (1000, "system"), *places, sizes=LARGE)
    assert wanted == {960: "system", 1984: "section", 3008: "section"}
    wanted = placed(8000, *places, start=2000, sizes=LARGE)
    assert list(wanted) == [2048, 3072], "what lies before was placed by the same rule"
    dense = msgspec.structs.replace(TINY, interval_tokens=64)
    assert len(placed(1000, (70, "section"), (200, "section"), sizes=dense)) == 15


def test_the_heads_of_tool_results_have_places_of_their_own() -> None:
    small = msgspec.structs.replace(LARGE, state_bytes=LARGE.page_bytes * 5)
    assert small.section_tokens == 64
    heads = [(place, "head") for place in range(704, 1664 + 64, 64)]
    wanted = placed(3000, (640, "tool"), *heads, (2900, "prompt"), start=640, sizes=small)
    assert [p for p in wanted if p < 1920] == [*range(704, 1664 + 64, 64)]
    assert {wanted[1280], wanted[1344], wanted[1664]} == {"interval", "head"}


@given(st.lists(st.integers(0, 9000), max_size=40), st.integers(0, 140), st.integers(1, 40))
def test_prompts_with_one_beginning_agree_on_their_sections(
    sections: list[int], num_start_pages: int, num_state_pages: int
) -> None:
    sizes = msgspec.structs.replace(LARGE, state_bytes=num_state_pages * LARGE.page_bytes)
    boundaries: list[tuple[int, Reason]] = [(place, "section") for place in sections]
    start = num_start_pages * PAGE_TOKENS
    whole = placed(9000, *boundaries, sizes=sizes)
    assert placed(9000, *boundaries, start=start, sizes=sizes) == {
        position: reason for position, reason in whole.items() if position > start
    }


def test_cover_follows_the_size_of_a_state() -> None:
    assert LARGE.cover_tokens == 8192
    small_state = msgspec.structs.replace(LARGE, state_bytes=LARGE.page_bytes * 10)
    assert small_state.cover_tokens == 20 * PAGE_TOKENS
    assert list(placed(40_000, sizes=LARGE)) == [8192, 16384, 24576, 32768]


def test_a_prompt_takes_its_share_of_the_budget_and_no_place_that_cannot_be_kept() -> None:
    sizes = msgspec.structs.replace(LARGE, budget_bytes=2 << 30)
    wanted = placed(200_000, (5000, "system"), (100_000, "mark"), (199_000, "prompt"), sizes=sizes)
    assert len(wanted) == sizes.max_states == 3
    assert max(wanted) <= sizes.max_position < 60_000
    assert wanted[4992] == "system"


@given(
    st.integers(0, 5000),
    st.lists(st.tuples(st.floats(0, 1), REASONS), max_size=8),
    st.integers(0, 5000),
    st.integers(0, 80),
    st.integers(1, 20).map(lambda pages: pages * PAGE_TOKENS),
)
def test_positions_are_on_the_grid_and_leave_no_gap(
    num_tokens: int,
    places: list[tuple[float, Reason]],
    start: int,
    num_shared_pages: int,
    interval: int,
) -> None:
    sizes = msgspec.structs.replace(TINY, interval_tokens=interval)
    boundaries = [(int(share * num_tokens), reason) for share, reason in places]
    num_shared = min(num_shared_pages, num_tokens // 64) * 64
    wanted = placed(num_tokens, *boundaries, start=start, num_shared=num_shared, sizes=sizes)
    assert list(wanted) == sorted(wanted)
    assert all(start < p <= num_tokens and p % PAGE_TOKENS == 0 for p in wanted)
    everything = [0, *placed(num_tokens, *boundaries, sizes=sizes), num_tokens]
    gaps = [right - left for left, right in zip(everything, everything[1:], strict=False)]
    assert max(gaps) < 2 * interval
    kept = [p for p, reason in boundaries if reason not in ("user", "tool", "section", "head")]
    assert all(position // 64 * 64 in everything for position in kept)


# ── eviction ──────────────────────────────────────────────────────────────────────────────────


def candidate(**changes: object) -> Candidate:
    plain = Candidate(
        reason="prompt",
        position=10_000,
        before=5_000,
        num_bytes=1000,
        heat=1.0,
        used_us=0,
        is_superseded=False,
    )
    return msgspec.structs.replace(plain, **changes)


def score(now_us: int = AGE_US, **changes: object) -> float:
    return keep_score(candidate(**changes), now_us)


def test_what_saves_more_stays_longer() -> None:
    assert score(before=0) > score()
    assert score(num_bytes=500) > score()
    assert score(heat=2.0) > score()
    assert score(used_us=AGE_US) > score()
    assert score(is_superseded=True) < score()
    assert score(reason="interval") < score() < score(reason="system")
    assert score(position=110_000, before=105_000) > score(), "a late token costs more"
    assert score(now_us=10 * AGE_US) < score()


def test_the_cost_of_a_stretch_is_that_of_its_parts() -> None:
    assert evaluation_cost(0, 300) == evaluation_cost(0, 100) + evaluation_cost(100, 300)


def test_uses_add_up_and_cool_down() -> None:
    assert heat_after_use(1.0, 0, 0) == 2.0
    assert heat_after_use(1.0, 0, AGE_US) == 1.25
    assert heat_after_use(1.0, 50, 0) == 2.0, "the clock went back"


def test_a_large_one_does_not_go_for_want_of_a_few_bytes() -> None:
    large, small, smaller = Ranked(1.0, b"l", 10_000), Ranked(2.0, b"s", 300), Ranked(3.0, b"t", 50)
    ascending = [large, small, smaller]
    assert choose_victim(ascending, 40) is smaller
    assert choose_victim(ascending, 60) is small
    assert choose_victim(ascending, 400) is large
    assert choose_victim(ascending, 20_000) is large
