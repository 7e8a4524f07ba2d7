"""Distances at which results are cut."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.text.cuts import MAX_CUTS, MIN_CUT, Cuts, UnsavedCuts


@given(st.lists(st.integers(0, MIN_CUT + 8)))
def test_the_latest_are_known(seen: list[int]) -> None:
    cuts = Cuts(UnsavedCuts())
    for number, cut in enumerate(seen):
        was_known = cut in cuts.known
        assert cuts.learn(cut) is (cut >= MIN_CUT and not was_known)
        latest = dict.fromkeys(c for c in reversed(seen[: number + 1]) if c >= MIN_CUT)
        assert cuts.known[::-1] == tuple(latest)[:MAX_CUTS]
