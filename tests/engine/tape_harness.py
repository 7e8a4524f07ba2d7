"""A StepEngine over a TapeModel, driven by hand."""

from collections.abc import Sequence

from memory_store import MemoryStore
from tape_model import TapeModel

from daemon.checkpoint import Boundary
from daemon.engine.checkpointing import CheckpointStore, NoCheckpoints
from daemon.engine.constraint import Constraint
from daemon.engine.engine import StepEngine
from daemon.engine.requests import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Progress,
    Started,
    TokenSampled,
)
from daemon.engine.scheduler import Limits, Scheduler

CONTEXT = 1024


def small_limits(
    max_sequences: int = 3, num_pages: int = 60, prefill_tokens: int = 128, captures: int = 2
) -> Limits:
    return Limits(max_sequences, 64, prefill_tokens, num_pages, captures)


def generation_request(
    number: int,
    tokens: Sequence[int],
    max_tokens: int = 8,
    boundaries: Sequence[int] = (),
    stop_tokens: Sequence[int] = (),
    constraint: Constraint | None = None,
) -> GenerationRequest:
    return GenerationRequest(
        id=f"r{number}",
        tokens=tuple(tokens),
        boundaries=tuple(Boundary(position, "user") for position in boundaries),
        max_tokens=max_tokens,
        stop_tokens=frozenset(stop_tokens),
        constraint=constraint,
    )


def build_engine(
    limits: Limits, store: CheckpointStore | None = None, canonical: bool = False
) -> StepEngine:
    return StepEngine(
        TapeModel(limits.num_slots, limits.num_pages),  # type: ignore[arg-type]
        Scheduler(limits),
        NoCheckpoints() if store is None else store,
        context_length=CONTEXT,
        num_tokens=50_000,
        strict=False,
        canonical=canonical,
        wake=lambda: None,
    )


class TapeHarness:
    def __init__(
        self,
        limits: Limits | None = None,
        store: MemoryStore | None = None,
        canonical: bool = False,
    ) -> None:
        self.limits = limits or small_limits()
        self.engine = build_engine(self.limits, store, canonical)
        self.model: TapeModel = self.engine.model  # type: ignore[assignment]
        self.scheduler = self.engine.scheduler
        self.replies: list[list[Event]] = []

    def submit(self, tokens: Sequence[int], **options: object) -> list[Event]:
        events: list[Event] = []
        request = generation_request(len(self.replies), tokens, **options)  # type: ignore[arg-type]
        self.replies.append(events)
        self.engine.add(request, events.append)
        return events

    def step(self) -> bool:
        self.model.tick()
        return self.engine.step()

    def run(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.step() and not self.engine.sequences and not self.model.under_way:
                return
        raise AssertionError("the engine did not come to rest")

    def assert_all_places_are_free(self) -> None:
        assert not self.engine.sequences
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.scheduler.places.pages.num_free == self.limits.num_pages
        assert self.scheduler.places.slots.num_free == self.limits.num_slots


def assert_in_order(events: Sequence[Event]) -> None:
    """Started, then progress up to the prompt's end, then tokens, then one end."""
    *body, last = events
    assert isinstance(last, Finished | Failed)
    order = [Started, Progress, TokenSampled]
    ranks = [order.index(type(event)) for event in body]
    assert ranks.count(0) == (1 if body else 0)
    assert not ranks or ranks[0] == 0
    done = [event.num_done_tokens for event in body if isinstance(event, Progress)]
    assert done == sorted(done)
    sampled = [event.token for event in body if isinstance(event, TokenSampled)]
    if isinstance(last, Finished):
        assert list(last.tokens) == sampled
        if sampled:
            assert max(done) == last.num_prompt_tokens
