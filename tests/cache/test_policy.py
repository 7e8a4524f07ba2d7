from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.policy import WORTH, Candidate, drop_order, eviction_order, positions
from daemon.checkpoint import PAGE_TOKENS, Boundary

REASONS = st.sampled_from(sorted(WORTH))


def test_boundaries_are_aligned_down_and_the_first_page_has_none() -> None:
    wanted = positions(500, [Boundary(63, "system"), Boundary(64, "user")], 0, 1024)
    assert wanted == {64: "user"}


def test_the_worthier_reason_is_recorded() -> None:
    boundaries = [Boundary(130, "user"), Boundary(140, "system"), Boundary(150, "prompt")]
    assert positions(500, boundaries, 0, 1024) == {128: "system"}


def test_intervals_cover_what_boundaries_leave() -> None:
    wanted = positions(4096, [Boundary(1000, "user")], 0, 1024)
    assert wanted == {960: "user", 2048: "interval", 3072: "interval", 4096: "interval"}


@given(
    st.integers(0, 5000),
    st.lists(st.tuples(st.floats(0, 1), REASONS), max_size=8),
    st.integers(0, 5000),
    st.integers(1, 20).map(lambda pages: pages * PAGE_TOKENS),
)
def test_positions_are_on_the_grid_and_leave_no_gap(
    num_tokens: int, places: list[tuple[float, str]], start: int, interval: int
) -> None:
    boundaries = [Boundary(int(share * num_tokens), reason) for share, reason in places]  # type: ignore[arg-type]
    wanted = positions(num_tokens, boundaries, start, interval)
    assert list(wanted) == sorted(wanted)
    assert all(start < p <= num_tokens and p % PAGE_TOKENS == 0 for p in wanted)
    everything = [0, *positions(num_tokens, boundaries, 0, interval), num_tokens]
    gaps = [right - left for left, right in zip(everything, everything[1:], strict=False)]
    assert max(gaps) < 2 * interval
    assert all(b.position // 64 * 64 in everything for b in boundaries)


def test_orders() -> None:
    rows = [
        Candidate(b"old system", "system", "prompt", 64, 1),
        Candidate(b"user", "user", "prompt", 128, 2),
        Candidate(b"deep user", "user", "prompt", 256, 2),
        Candidate(b"reply", "reply", "decode", 320, 2),
        Candidate(b"new interval", "interval", "prompt", 64, 3),
    ]
    assert [row.key for row in eviction_order(rows)] == [
        b"old system", b"reply", b"deep user", b"user", b"new interval",
    ]  # fmt: skip
    assert [row.key for row in drop_order(rows)] == [
        b"new interval", b"reply", b"user", b"deep user", b"old system",
    ]  # fmt: skip
