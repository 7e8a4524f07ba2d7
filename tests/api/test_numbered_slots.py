"""Numbers of replies: the lowest free, and the same to the end."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.api.slots import Slots


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_the_lowest_free_number_until_the_end(events: list[tuple[bool, int]]) -> None:
    slots: Slots[int] = Slots()
    expected: dict[int, int] = {}
    for begins, who in events:
        if begins:
            slots.take(who)
            if who not in expected:
                expected[who] = min(set(range(len(expected) + 1)) - set(expected.values()))
        else:
            slots.release(who)
            expected.pop(who, None)
        assert slots.held() == {number: who for who, number in expected.items()}
