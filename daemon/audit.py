"""The self-audit: a share of resumed requests is evaluated again, resumed and cold, and compared.

Owns the sampling of requests, the comparison and its counts. Stands before the engine and asks it
for two pieces of idle work a sample; knows no store, only how to have a record dropped. Events come
on the engine's thread.
"""

import logging
import random
import threading
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from daemon.checkpoint import Found
from daemon.engine.requests import (
    Deliver,
    Engine,
    EngineInfo,
    Event,
    Finished,
    GenerationRequest,
    SamplingParams,
    Started,
    TokenLogprobs,
    TokenSampled,
)
from daemon.errors import QwendError

logger = logging.getLogger(__name__)

NUM_ALTERNATIVES = 20
TOLERANCE = 1e-3
"""Of a natural logarithm. A state born by prompt evaluation equals the cold one bit for bit; only
the way from logits to logarithms may round."""

_GREEDY = SamplingParams(temperature=0.0, logprobs=NUM_ALTERNATIVES)

Discard = Callable[[Sequence[int]], None]
"""Drops the checkpoints of a prompt, and all that shares a page with them."""


class AuditCounts(Struct, frozen=True, kw_only=True):
    """Since the daemon started. `num_abandoned` were overtaken: by other work, or by eviction."""

    share: float
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
        try:
            self._engine.submit(request, deliver)
        except QwendError:
            self.count(num_abandoned=1)

    def judge(self, request: GenerationRequest, found: Found, pair: Sequence[TokenSampled]) -> None:
        """Compare what followed on the checkpoint with what followed on a cold evaluation."""
        resumed, cold = pair
        if _are_equal(resumed, cold):
            self.count(num_compared=1)
            return
        self.count(num_compared=1, num_mismatches=1)
        logger.error(
            "request %s went on from a checkpoint at %d tokens that does not equal a cold "
            "evaluation; it is dropped with all that shares its pages",
            request.id,
            found.position,
        )
        self._discard(request.tokens)

    def count(self, **more: int) -> None:
        """Add to the counts."""
        with self._lock:
            sums = {name: getattr(self._counts, name) + number for name, number in more.items()}
            self._counts = msgspec.structs.replace(self._counts, **sums)


class _Sample:
    """One request that may be audited: its events on their way, then two evaluations of ours."""

    def __init__(self, audit: AuditedEngine, request: GenerationRequest, deliver: Deliver) -> None:
        self._audit = audit
        self._request = request
        self._deliver = deliver
        self._found: Found | None = None
        self._sampled: list[TokenSampled] = []

    def deliver(self, event: Event) -> None:
        """Pass an event on; when a resumed request has ended well, begin."""
        if isinstance(event, Started):
            self._found = event.restored
        self._deliver(event)
        is_resumed = self._found is not None and self._found.born == "prompt"
        if isinstance(event, Finished) and event.reason != "cancelled" and is_resumed:
            assert self._found is not None
            self._evaluate("resumed", self._found.position)

    def _evaluate(self, name: str, max_cached: int) -> None:
        request = GenerationRequest(
            id=f"{self._request.id}-{name}",
            tokens=self._request.tokens,
            sampling=_GREEDY,
            max_tokens=1,
            session=self._request.session,
            priority="idle",
            max_cached=max_cached,
        )
        self._audit.evaluate(request, self._evaluated)

    def _evaluated(self, event: Event) -> None:
        """Events of our own evaluations: after the resumed one the cold one, after that the
        verdict."""
        if isinstance(event, TokenSampled):
            self._sampled.append(event)
        elif isinstance(event, Finished):
            self._ended(event)

    def _ended(self, event: Finished) -> None:
        assert self._found is not None
        is_first = len(self._sampled) == 1 and event.num_cached_tokens > 0
        if is_first and event.num_cached_tokens == self._found.position:
            self._evaluate("cold", 0)
        elif len(self._sampled) == 2:
            self._audit.judge(self._request, self._found, self._sampled)
        else:
            self._audit.count(num_abandoned=1)


def _are_equal(one: TokenSampled, other: TokenSampled) -> bool:
    """Whether two evaluations give the same token and the same likeliest alternatives."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    return one.token == other.token and _distance(one.logprobs, other.logprobs) <= TOLERANCE


def _distance(one: TokenLogprobs, other: TokenLogprobs) -> float:
    """The greatest difference between the logarithms of the same tokens; those that only one of
    them lists stand at the list's end, where alternatives may tie."""
    first, second = dict(one.alternatives), dict(other.alternatives)
    shared = first.keys() & second.keys()
    pairs = [(first[token], second[token]) for token in shared] + [(one.chosen, other.chosen)]
    is_other_list = 2 * len(shared) < len(first)
    return float("inf") if is_other_list else max(abs(a - b) for a, b in pairs)
