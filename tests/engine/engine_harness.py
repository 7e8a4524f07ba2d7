"""Drives a StepEngine by hand: no thread, every step under the test's control."""

import time
from collections.abc import Sequence

import numpy as np
from memory_store import MemoryStore

from daemon.checkpoint import Boundary
from daemon.engine.engine import StepEngine
from daemon.engine.model.model import Model
from daemon.engine.requests import Event, Finished, GenerationRequest, SamplingParams, Started
from daemon.engine.scheduler import Limits, Scheduler

GREEDY = SamplingParams(temperature=0.0)


class Reply:
    """What one request got back."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return list(self.finished.tokens)

    @property
    def num_cached(self) -> int:
        assert isinstance(self.events[0], Started), self.events
        return self.events[0].num_cached_tokens


class RecordingModel:
    """A model that keeps the logits of every prompt's last row, beside the tokens it ends with."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.backend = model.backend
        self.rows: list[tuple[int, np.ndarray, np.ndarray]] = []

    def logits(self, batch: object) -> np.ndarray:
        logits = self.model.logits(batch)  # type: ignore[arg-type]
        sampling = [span for span in batch.spans if span.samples]  # type: ignore[attr-defined]
        if batch.kind == "prefill":  # type: ignore[attr-defined]
            rows = self.backend.logits_to_host(logits)
            for span, row in zip(sampling, rows, strict=False):
                self.rows.append((span.end, span.tokens, row.copy()))
        return logits


class EngineHarness:
    def __init__(
        self,
        model: Model,
        store: MemoryStore | None = None,
        *,
        strict: bool = False,
        canonical: bool = False,
        max_sequences: int = 4,
        num_pages: int = 200,
        prefill_tokens: int = 256,
    ) -> None:
        limits = Limits(max_sequences, 64, prefill_tokens, num_pages, 2)
        model.backend.allocate(model.shape, limits.num_slots, limits.num_pages)
        self.store = MemoryStore() if store is None else store
        self.model = RecordingModel(model)
        self.num_requests = 0
        self.engine = StepEngine(
            self.model,  # type: ignore[arg-type]
            Scheduler(limits),
            self.store,
            context_length=8192,
            num_tokens=model.shape.vocab_size,
            strict=strict,
            canonical=canonical,
            wake=lambda: None,
        )

    def submit(
        self,
        tokens: Sequence[int],
        max_tokens: int = 8,
        boundaries: Sequence[int] = (),
        sampling: SamplingParams = GREEDY,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> Reply:
        reply = Reply()
        self.num_requests += 1
        request = GenerationRequest(
            id=f"r{self.num_requests}",
            tokens=tuple(int(t) for t in tokens),
            boundaries=tuple(Boundary(p, "user") for p in boundaries),
            sampling=sampling,
            max_tokens=max_tokens,
            stop_tokens=stop_tokens,
        )
        self.engine.add(request, reply.events.append)
        return reply

    def run(self) -> None:
        for _ in range(5000):
            if self.engine.step():
                continue
            if not self.engine.sequences:
                self.engine.saving.finish()
                return
            time.sleep(0.001)  # a checkpoint is on its way
        raise AssertionError("the engine did not come to rest")

    def generate(self, tokens: Sequence[int], **options: object) -> Reply:
        reply = self.submit(tokens, **options)  # type: ignore[arg-type]
        self.run()
        return reply

    def last_prompt_logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Prompts are told apart by what was evaluated last of each."""
        return next(
            row
            for end, tail, row in reversed(self.model.rows)
            if end == len(prompt) and np.array_equal(tail, prompt[-len(tail) :])
        )
