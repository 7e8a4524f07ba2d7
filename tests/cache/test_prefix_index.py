"""The index against a list of checkpoints that is searched by brute force."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from daemon.cache.prefix_hash import PrefixChain
from daemon.cache.prefix_index import PageRow, PrefixIndex
from daemon.cache.records import NO_PARENT, ON_GRID, StateHeader, Use
from daemon.cache.store import footprint
from daemon.checkpoint import Birth

MODEL = bytes(16)
USE = Use(used_us=1)
PAGE_SIZES = (0, 100, 5000)
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
"""A prompt of up to five pages, each of one token repeated: many share a beginning."""


def chain_of(prompt: list[int]) -> PrefixChain:
    return PrefixChain(MODEL, [token for token in prompt for _ in range(64)])


def state_of(prompt: list[int], born: Birth, variant: bytes = ON_GRID) -> StateHeader:
    return StateHeader(
        hash=chain_of(prompt).hashes[-1],
        born=born,
        reason="prompt",
        variant=variant,
        fingerprint=MODEL,
        position=64 * len(prompt),
        num_grid_pages=len(prompt),
        session="",
        created_us=1,
        payload_bytes=300,
    )


class IndexAgainstLists(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.saved: dict[bytes, tuple[list[int], StateHeader]] = {}

    @rule(prompt=PROMPTS, born=st.sampled_from(["prompt", "decode"]))
    def save(self, prompt: list[int], born: Birth) -> None:
        state = state_of(prompt, born)
        if state.key in self.saved:
            return
        parent = NO_PARENT
        for number, hash in enumerate(chain_of(prompt).hashes):
            if self.index.page(hash + ON_GRID) is None:
                assert self.index.add_page(PageRow(hash + ON_GRID, parent, 100), number)
            parent = hash + ON_GRID
        assert self.index.add_state(state, USE)
        self.saved[state.key] = (prompt, state)

    @rule(data=st.data())
    def remove_state(self, data: st.DataObject) -> None:
        if self.saved:
            key = data.draw(st.sampled_from(sorted(self.saved)))
            assert self.index.remove_state(key).states == (key,)
            del self.saved[key]

    @rule(prompt=PROMPTS)
    def lose_page(self, prompt: list[int]) -> None:
        removed = self.index.remove_page(chain_of(prompt).hashes[-1] + ON_GRID)
        fallen = {k for k, (p, _) in self.saved.items() if p[: len(prompt)] == prompt}
        assert set(removed.states) == fallen
        for key in fallen:
            del self.saved[key]

    @rule(prompt=PROMPTS, limit=st.integers(0, 400), strict=st.booleans())
    def find(self, prompt: list[int], limit: int, strict: bool) -> None:
        usable = [
            (state.position, state.born == "prompt", key)
            for key, (saved, state) in self.saved.items()
            if saved == prompt[: len(saved)] and state.position <= limit
            if state.born == "prompt" or not strict
        ]
        found = self.index.find(chain_of(prompt).hashes, limit, strict)
        assert (found.key if found else None) == (max(usable)[2] if usable else None)

    @invariant()
    def pages_are_those_that_states_need(self) -> None:
        needed = {hash for prompt, _ in self.saved.values() for hash in chain_of(prompt).hashes}
        assert {key[:16] for key in self.index._pages} == needed
        for _, state in self.saved.values():
            assert [key[:16] for key in self.index.chain(state.tip)] == self.chain(state)
        size = len(needed) * footprint(100) + len(self.saved) * footprint(300)
        assert self.index.num_bytes == size

    @invariant()
    def neighbours_are_those_of_the_prompts(self) -> None:
        prompts = {tuple(prompt) for prompt, _ in self.saved.values()}
        evaluated = {tuple(p) for p, state in self.saved.values() if state.born == "prompt"}
        for key, (prompt, state) in self.saved.items():
            as_good = evaluated if state.born == "prompt" else prompts
            before = [p for p in as_good if len(p) < len(prompt) and p == tuple(prompt[: len(p)])]
            weighed = self.index.candidate(key)
            assert weighed is not None
            assert weighed.before == 64 * max(map(len, before), default=0)
            after = [p for p in prompts if p[: len(prompt)] == tuple(prompt) != p]
            nearest = [p for p in after if not any(p != q and p[: len(q)] == q for q in after)]
            assert weighed.is_superseded is (len(nearest) == 1 and nearest[0] in as_good)

    @rule(prompt=PROMPTS)
    def num_known(self, prompt: list[int]) -> None:
        shared = [
            next((i for i, (a, b) in enumerate(zip(p, prompt, strict=False)) if a != b),
                 min(len(p), len(prompt)))
            for p, _ in self.saved.values()
        ]  # fmt: skip
        assert self.index.num_known(chain_of(prompt).hashes) == max(shared, default=0)

    def chain(self, state: StateHeader) -> list[bytes]:
        return chain_of(self.saved[state.key][0]).hashes


TestIndexAgainstLists = IndexAgainstLists.TestCase
TestIndexAgainstLists.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_page_needs_the_page_before_it() -> None:
    index = PrefixIndex()
    first, second = (b"1" * 24, b"2" * 24)
    assert not index.add_page(PageRow(second, first, 1), 1)
    assert not index.add_page(PageRow(first, NO_PARENT, 1), 1), "the first page is number 0"
    assert index.add_page(PageRow(first, NO_PARENT, 1), 0)
    assert not index.add_page(PageRow(second, first, 1), 2)
    assert index.add_page(PageRow(second, first, 1), 1)


@given(st.integers(1, 3), st.integers(1, 3))
def test_a_state_of_another_depth_is_stranded(num_pages: int, depth: int) -> None:
    index = PrefixIndex()
    prompt = [0] * num_pages
    parent = NO_PARENT
    for number, hash in enumerate(chain_of(prompt).hashes):
        index.add_page(PageRow(hash + ON_GRID, parent, 1), number)
        parent = hash + ON_GRID
    state = state_of([0] * depth, "prompt")
    assert index.add_state(state, USE) is (depth <= num_pages)


def test_a_page_chain_knows_its_bytes() -> None:
    index = PrefixIndex()
    keys = [bytes([n]) * 24 for n in range(1, 4)]
    for number, (key, size) in enumerate(zip(keys, PAGE_SIZES, strict=True)):
        index.add_page(PageRow(key, keys[number - 1] if number else NO_PARENT, size), number)
    tip = index.page(keys[2])
    assert tip is not None
    assert tip.num_chain_bytes == sum(map(footprint, PAGE_SIZES))
    assert index.prune_all() == keys[::-1]
    assert index.num_bytes == 0
