"""Conversations that are edited anywhere, over the real engine and the real store: every reply is
as if nothing had been kept, whatever lies on the device, in memory or on disk, or was wiped."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tape_model import TapeModel, continuation

from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.checkpoint import Boundary, Reason
from daemon.engine.engine import StepEngine
from daemon.engine.requests import Event, Finished, GenerationRequest, Started
from daemon.engine.scheduler import Limits, Scheduler

NUM_INNER_SLOTS = 6
REASONS: tuple[Reason, ...] = ("user", "tool", "section", "head", "mark")


class SparseModel(TapeModel):
    """Its states are so large, as it says, that the store places few of them."""

    snapshot_sizes = 1 << 20, 1 << 14


class Conversations(RuleBasedStateMachine):
    """Requests in flight together, each checked when it has ended."""

    strict = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.open()
        self.tokens: list[int] = [5] * 300
        self.asked: list[tuple[list[int], int, list[Event]]] = []
        self.num_asked = 0

    def open(self) -> None:
        limits = Limits(2, 64, 256, 40, 2, max_residents=3, num_inner_slots=NUM_INNER_SLOTS)
        self.cache = CheckpointCache.open(
            Path(self.folder.name),
            CacheLimits(budget_bytes=64 << 20, memory_bytes=1 << 20),
            fingerprint=b"a model of tapes",
            model_name="tape",
        )
        self.scheduler = Scheduler(limits, self.strict)
        self.engine = StepEngine(
            SparseModel(limits.num_slots, limits.num_pages),  # type: ignore[arg-type]
            self.scheduler,
            self.cache,
            context_length=2048,
            num_tokens=50_000,
            strict=self.strict,
            canonical=True,
            wake=lambda: None,
        )

    def teardown(self) -> None:
        self.close()
        self.folder.cleanup()

    def close(self) -> None:
        while self.engine.step() or self.engine.sequences:
            pass
        for tokens, max_tokens, events in self.asked:
            last = events[-1]
            assert isinstance(last, Finished)
            assert list(last.tokens) == continuation(tokens, max_tokens)
            started = events[0]
            assert isinstance(started, Started)
            assert started.num_cached_tokens < len(tokens)
        self.asked = []
        self.engine.stop()
        self.cache.close()

    @rule(share=st.floats(0, 0.99), value=st.integers(0, 2), length=st.integers(1, 300))
    def edit(self, share: float, value: int, length: int) -> None:
        at = int(len(self.tokens) * share)
        self.tokens = [*self.tokens[:at], *([value] * length), *self.tokens[at + length :]][:900]

    @rule(max_tokens=st.integers(1, 140), places=st.lists(st.tuples(
        st.floats(0, 1), st.sampled_from(REASONS)), max_size=12))  # fmt: skip
    def ask(self, max_tokens: int, places: list[tuple[float, Reason]]) -> None:
        tokens = list(self.tokens)
        boundaries = {int(share * len(tokens)): reason for share, reason in places}
        request = GenerationRequest(
            id=f"r{self.num_asked}",
            tokens=tuple(tokens),
            boundaries=tuple(Boundary(*boundary) for boundary in sorted(boundaries.items())),
            max_tokens=max_tokens,
        )
        events: list[Event] = []
        self.num_asked += 1
        self.asked.append((tokens, max_tokens, events))
        self.engine.add(request, events.append)

    @rule(num_steps=st.integers(1, 60))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @rule()
    def go_on(self) -> None:
        """The conversation goes on with the reply to it."""
        self.tokens = [*self.tokens, *continuation(self.tokens, 70)][:900]

    @rule()
    def discard(self) -> None:
        self.cache.discard(self.tokens)

    @rule()
    def restart(self) -> None:
        self.close()
        self.open()

    @invariant()
    def nobody_has_a_place_of_another(self) -> None:
        places = self.scheduler.places
        held = [s.branch.slot for s in places.inner._states.values()]
        held += [r.branch.slot for r in places.residents._residents]
        held += [slot for s in self.scheduler.running for slot in (s.slot, s.mark_slot)]
        assert len(held) == len(set(held))
        assert len(places.inner) <= NUM_INNER_SLOTS


class StrictConversations(Conversations):
    """With --strict."""

    strict = True


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestStrictConversations = StrictConversations.TestCase
TestStrictConversations.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
