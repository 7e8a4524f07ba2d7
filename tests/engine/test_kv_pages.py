"""The free list of pages: nothing is lost or used twice, and neighbours stay neighbours."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.engine.memory.kv_pages import KVPages

NUM_PAGES = 24


class PagesMachine(RuleBasedStateMachine):
    """Sequences take, share, grow and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = KVPages(NUM_PAGES)
        self.tables: list[tuple[int, ...]] = []

    def take(self, count: int, after: tuple[int, ...] = ()) -> tuple[int, ...] | None:
        num_free = self.pages.num_free
        taken = self.pages.take(count, after)
        assert (taken is None) == (count > num_free)
        assert self.pages.num_free == num_free - len(taken or ())
        assert taken is None or len(taken) == count
        return taken

    @rule(count=st.integers(0, NUM_PAGES + 2))
    def begin(self, count: int) -> None:
        taken = self.take(count)
        if taken:
            self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 4))
    def grow(self, data: st.DataObject, count: int) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables[index]
        free = set(range(NUM_PAGES)) - {page for each in self.tables for page in each}
        taken = self.take(count, after=table)
        if taken is not None:
            if table[-1] + 1 in free:
                assert taken[0] == table[-1] + 1
            self.tables[index] = table + taken

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = self.tables[data.draw(st.integers(0, len(self.tables) - 1))]
        known = table[: data.draw(st.integers(1, len(table)))]
        num_free = self.pages.num_free
        self.pages.share(known)
        assert self.pages.num_free == num_free
        self.tables.append(known)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pages.give_back(table)

    @invariant()
    def a_page_is_free_when_nobody_holds_it(self) -> None:
        owned = {page for table in self.tables for page in table}
        assert len(owned) == NUM_PAGES - self.pages.num_free
        assert all(0 <= page < NUM_PAGES for page in owned)
        assert all(len(table) == len(set(table)) for table in self.tables)

    @rule(count=st.integers(1, 4), spared=st.integers(0, NUM_PAGES))
    def take_and_spare(self, count: int, spared: int) -> None:
        num_free = self.pages.num_free
        taken = self.pages.take(count, spared=spared)
        assert (taken is not None) == (count + spared <= num_free)
        if taken is not None:
            self.tables.append(taken)


PagesMachine.TestCase.settings = settings(max_examples=60, deadline=None)
TestPages = PagesMachine.TestCase


@given(count=st.integers(1, NUM_PAGES))
def test_pages_of_an_empty_pool_are_adjacent(count: int) -> None:
    taken = KVPages(NUM_PAGES).take(count)
    assert taken is not None
    assert taken == tuple(range(taken[0], taken[0] + count))


def test_two_growing_sequences_do_not_interleave() -> None:
    pages = KVPages(64)
    tables = [pages.take(2) or (), pages.take(2) or ()]
    for _ in range(10):
        for i in range(2):
            tables[i] += pages.take(1, after=tables[i]) or ()
    for table in tables:
        assert table == tuple(range(table[0], table[0] + 12))


def test_a_free_page_cannot_be_shared() -> None:
    with pytest.raises(AssertionError, match="is free"):
        KVPages(4).share((2,))


def test_a_page_cannot_be_given_back_twice() -> None:
    pages = KVPages(4)
    taken = pages.take(2)
    assert taken is not None
    pages.give_back(taken)
    with pytest.raises(AssertionError, match="is free"):
        pages.give_back(taken)
