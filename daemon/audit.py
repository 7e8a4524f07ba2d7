"""The self-audit: a share of resumed requests is evaluated again, cold, and compared.

Owns the sampling of requests, the comparison and its counts. Stands before the engine, which tells
it what a resumed prompt led to, and asks it for one piece of idle work a sample; knows no store,
only how to have a record dropped. Events come on the engine's thread.
"""

import logging
import random
import threading
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from daemon.engine.requests import (
    Deliver,
    Engine,
    EngineInfo,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Probed,
    SamplingParams,
)
from daemon.errors import QwendError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Of a natural logarithm. A state born by prompt evaluation equals the cold one bit for bit; only
the way from logits to logarithms may round."""

Discard = Callable[[Sequence[int]], None]
"""Drops the checkpoints of a prompt, and all that shares a page with them."""


class AuditCounts(Struct, frozen=True, kw_only=True):
    """Since the daemon started. `num_waiting` have not come to their verdict yet; `num_abandoned`
    never will: more came than the idle device could do, or it failed."""

    share: float
    num_waiting: int = 0
    num_compared: int = 0
    num_mismatches: int = 0
    num_abandoned: int = 0


class AuditedEngine:
    """An engine whose answers are the same, and some of which are checked afterwards.

    Args:
        share: of the requests that go on from a state born by prompt evaluation.
        choose: a number in [0, 1) for each request.
    """

    def __init__(
        self,
        engine: Engine,
        share: float,
        discard: Discard,
        choose: Callable[[], float] = random.random,
    ) -> None:
        self._engine = engine
        self._discard = discard
        self._choose = choose
        self._lock = threading.Lock()
        self._counts = AuditCounts(share=share)

    @property
    def info(self) -> EngineInfo:
        """What is served; constant."""
        return self._engine.info

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """See `Engine.submit`."""
        if request.priority == "client" and self._choose() < self._counts.share:
            deliver = _Sample(self, request, deliver).deliver
            request = msgspec.structs.replace(request, probe=True)
        self._engine.submit(request, deliver)

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._engine.cancel(request_id)

    def counts(self) -> AuditCounts:
        """How many were compared, and with what result."""
        with self._lock:
            return self._counts

    def evaluate(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue idle work; when the engine takes none any more, the sample is given up."""
        self.count(num_waiting=1)
        try:
            self._engine.submit(request, deliver)
        except QwendError:
            self.give_up()

    def give_up(self) -> None:
        """A sample gets no verdict."""
        self.count(num_waiting=-1, num_abandoned=1)

    def judge(self, request: GenerationRequest, resumed: Probed, cold: Probed) -> None:
        """Compare what followed on the checkpoint with what followed on a cold evaluation."""
        is_equal = _distance(resumed, cold) <= TOLERANCE
        self.count(num_waiting=-1, num_compared=1, num_mismatches=int(not is_equal))
        if is_equal:
            return
        logger.error(
            "request %s went on from a checkpoint at %d tokens that does not equal a cold "
            "evaluation; it is dropped with all that shares its pages",
            request.id,
            resumed.num_restored_tokens,
        )
        self._discard(request.tokens)

    def count(self, **more: int) -> None:
        """Add to the counts."""
        with self._lock:
            sums = {name: getattr(self._counts, name) + number for name, number in more.items()}
            self._counts = msgspec.structs.replace(self._counts, **sums)


class _Sample:
    """One request that may be audited: its events on their way, then an evaluation of ours."""

    def __init__(self, audit: AuditedEngine, request: GenerationRequest, deliver: Deliver) -> None:
        self._audit = audit
        self._request = request
        self._deliver = deliver
        self._resumed: Probed | None = None
        self._cold: Probed | None = None

    def deliver(self, event: Event) -> None:
        """Pass an event on; when a resumed request has ended well, begin."""
        if isinstance(event, Probed):
            is_resumed = event.num_restored_tokens > 0 and event.born == "prompt"
            self._resumed = event if is_resumed else None
            return
        self._deliver(event)
        if isinstance(event, Finished) and event.reason != "cancelled" and self._resumed:
            self._audit.evaluate(_cold(self._request), self._evaluated)

    def _evaluated(self, event: Event) -> None:
        """Events of our own evaluation; the last brings the verdict."""
        if isinstance(event, Probed):
            self._cold = event
        elif isinstance(event, Finished | Failed):
            if self._resumed is None or self._cold is None:
                self._audit.give_up()
            else:
                self._audit.judge(self._request, self._resumed, self._cold)


def _cold(request: GenerationRequest) -> GenerationRequest:
    """The same prompt, evaluated without checkpoints."""
    return GenerationRequest(
        id=f"{request.id}-audit",
        tokens=request.tokens,
        boundaries=request.boundaries,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=1,
        session=request.session,
        priority="audit",
        probe=True,
    )


def _distance(one: Probed, other: Probed) -> float:
    """The greatest difference between the logarithms of the same tokens; those that only one of
    them lists stand at the list's end, where alternatives may tie."""
    first, second = dict(one.alternatives), dict(other.alternatives)
    shared = first.keys() & second.keys()
    if 2 * len(shared) < len(first):
        return float("inf")
    return max(abs(first[token] - second[token]) for token in shared)
