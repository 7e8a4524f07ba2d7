"""The free list of slots."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.memory.slots import Slots


@given(steps=st.lists(st.booleans(), max_size=60), num_slots=st.integers(0, 8))
def test_every_slot_has_one_owner(steps: list[bool], num_slots: int) -> None:
    slots, owned = Slots(num_slots), list[int]()
    for takes in steps:
        if takes:
            slot = slots.take()
            assert (slot is None) == (len(owned) == num_slots)
            if slot is not None:
                assert slot not in owned
                assert 0 <= slot < num_slots
                owned.append(slot)
        elif owned:
            slots.give_back(owned.pop(0))
        assert slots.num_free == num_slots - len(owned)


def test_a_slot_cannot_be_given_back_twice() -> None:
    slots = Slots(2)
    slot = slots.take()
    assert slot is not None
    slots.give_back(slot)
    with pytest.raises(AssertionError, match="is free"):
        slots.give_back(slot)
