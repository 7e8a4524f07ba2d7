"""Random conversations, edits, restarts and evictions against a list searched by brute force."""

import tempfile
from pathlib import Path

from cache_harness import PAGE_BYTES, STATE_BYTES, Simulated, open_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import Struct

from daemon.cache.checkpoint_cache import MIN_BUDGET_BYTES
from daemon.cache.policy import WORTH
from daemon.checkpoint import Birth, Boundary


class Saved(Struct, frozen=True):
    """A checkpoint as it was when it was saved."""

    tokens: tuple[int, ...]
    born: Birth
    state: bytes
    pages: tuple[bytes, ...]


class History(RuleBasedStateMachine):
    """A conversation that grows, is cut, edited and forked; each request goes the engine's way."""

    state_bytes = STATE_BYTES
    page_bytes = PAGE_BYTES
    budget_bytes = 64 << 20
    memory_bytes = 4 * STATE_BYTES
    is_evicting = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.cache = self.open()
        self.saved: list[Saved] = []
        self.tokens: list[int] = []

    def open(self):  # type: ignore[no-untyped-def]
        return open_cache(
            Path(self.folder.name),
            budget_bytes=self.budget_bytes,
            queue_bytes=1 << 30,
            memory_bytes=self.memory_bytes,
        )

    def teardown(self) -> None:
        self.cache.close()
        self.folder.cleanup()

    @rule(num_tokens=st.integers(1, 200), value=st.integers(0, 1))
    def append(self, num_tokens: int, value: int) -> None:
        self.tokens = (self.tokens + [value] * num_tokens)[:600]

    @rule(share=st.floats(0, 1))
    def cut(self, share: float) -> None:
        self.tokens = self.tokens[: int(len(self.tokens) * share)]

    @rule(share=st.floats(0, 0.99), value=st.integers(0, 1))
    def edit(self, share: float, value: int) -> None:
        if self.tokens:
            self.tokens[int(len(self.tokens) * share)] = value

    @rule(strict=st.booleans(), num_replied=st.integers(0, 150), data=st.data())
    def request(self, strict: bool, num_replied: int, data: st.DataObject) -> None:
        sequence = Simulated(
            self.cache, self.tokens, page_bytes=self.page_bytes, state_bytes=self.state_bytes
        )
        self.resume(sequence, strict)
        start = len(sequence.pages)
        sequence.prefill()
        places = st.lists(
            st.tuples(st.integers(0, len(self.tokens)), st.sampled_from(sorted(WORTH))), max_size=4
        )
        boundaries = [Boundary(*place) for place in data.draw(places)]
        for position in sequence.timeline.positions(boundaries, 64 * start):
            self.save(sequence, position)
        sequence.decode([1] * num_replied)
        if len(sequence.tokens) // 64 > len(self.tokens) // 64:
            self.save(sequence, len(sequence.tokens) // 64 * 64)
        self.tokens = sequence.tokens[:600]

    @rule()
    def flush(self) -> None:
        self.cache.flush()

    @rule()
    def restart(self) -> None:
        self.cache.close()
        self.cache = self.open()
        assert self.cache.stats().num_damaged == 0

    def resume(self, sequence: Simulated, strict: bool) -> None:
        found = sequence.resume(strict=strict)
        tokens = tuple(sequence.tokens)
        usable = [
            entry
            for entry in self.saved
            if entry.tokens == tokens[: len(entry.tokens)]
            and (entry.born == "prompt" or not strict)
        ]
        best = max(usable, key=lambda e: (len(e.tokens), e.born == "prompt"), default=None)
        if found is None:
            assert best is None or self.is_evicting
            return
        assert best is not None
        if not self.is_evicting:
            assert (found.position, found.born) == (len(best.tokens), best.born)
        restored = (tuple(sequence.tokens[: found.position]), found.born)
        bits = (sequence.state, tuple(sequence.pages))
        saved = [(e.state, e.pages) for e in usable if (e.tokens, e.born) == restored]
        assert bits in saved if self.is_evicting else bits == saved[0]

    def save(self, sequence: Simulated, position: int) -> None:
        snapshot = sequence.save(position)
        tokens = tuple(sequence.tokens[:position])
        known = {entry.born for entry in self.saved if entry.tokens == tokens}
        if self.is_evicting or not ({"prompt", sequence.born} & known):
            pages = tuple(map(bytes, sequence.pages[: position // 64]))
            self.saved.append(Saved(tokens, sequence.born, bytes(snapshot.state), pages))

    @invariant()
    def nothing_is_lost_or_damaged(self) -> None:
        stats = self.cache.stats()
        assert stats.num_damaged == 0
        assert stats.num_dropped == 0 or self.is_evicting


class HistoryUnderABudget(History):
    """States of 1 MiB and a store of 16: most of what is saved goes again."""

    state_bytes = 1 << 20
    page_bytes = 100_000
    budget_bytes = MIN_BUDGET_BYTES
    is_evicting = True

    @invariant()
    def the_budget_is_respected(self) -> None:
        self.cache.flush()
        assert self.cache.stats().num_bytes <= self.budget_bytes * 13 // 16
        file = Path(self.folder.name) / "data.mdb"
        assert file.stat().st_size <= self.budget_bytes


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestHistoryUnderABudget = HistoryUnderABudget.TestCase
TestHistoryUnderABudget.settings = settings(max_examples=5, stateful_step_count=20, deadline=None)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_third_to_branch_at_a_place_evaluates_from_there(data: st.DataObject) -> None:
    """Whatever was kept of the first prompt, the second keeps the state where it leaves it."""
    shared = data.draw(st.integers(64, 400))
    lengths = [data.draw(st.integers(80, 300)) for _ in range(3)]
    prompts = [[7] * shared + [number] * length for number, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(Path(folder))
        for tokens in prompts[:2]:
            sequence = Simulated(cache, tokens)
            sequence.resume()
            start = 64 * len(sequence.pages)
            sequence.prefill()
            for position in sequence.timeline.positions([Boundary(len(tokens), "prompt")], start):
                sequence.save(position)
        found = Simulated(cache, prompts[2]).resume()
        assert found is not None
        assert found.position == shared // 64 * 64
        cache.close()
