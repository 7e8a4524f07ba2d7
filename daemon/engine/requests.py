"""What crosses the engine's thread boundary: requests in, events out. All frozen.

Owns the types only. Token ids and positions; no text, no tensors, no HTTP.
"""

from collections.abc import Callable
from typing import Literal, Protocol

from msgspec import Struct

from daemon.checkpoint import Birth, Boundary, Found
from daemon.engine.constraint import Constraint
from daemon.errors import QwendError

FinishReason = Literal["stop", "length", "cancelled"]


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How to choose the next token. The defaults sample from the model as it is.

    `top_k` 0, `top_p` 1, `min_p` 0 and penalties at their neutral value switch a stage off;
    temperature 0 is greedy. `logprobs` is the number of alternatives to report (None: none).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


Priority = Literal["client", "next", "canonical", "audit"]
"""How urgent it is, the most urgent first. All but a client's requests are idle work: it runs while
none of these waits or runs and nothing more urgent does, gives way within one small step, goes on
from where it was, and is the first to be given up. An audit starts from no checkpoint and leaves
none."""


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """One prompt to continue. `session` is a client's hint of affinity, never part of a key.

    With `max_tokens` 0 nothing is sampled: the prompt is evaluated up to the last of `boundaries`
    that has no checkpoint yet, and ends as "length". That, as idle work, is how work for
    requests to come is done ahead. With `probe`, what is likeliest to follow the prompt is reported
    as `Probed`. `constraint` says what may follow, None: anything; the engine takes it over.
    """

    id: str
    tokens: tuple[int, ...]
    boundaries: tuple[Boundary, ...] = ()
    sampling: SamplingParams = SamplingParams()
    max_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    session: str = ""
    priority: Priority = "client"
    probe: bool = False
    constraint: Constraint | None = None


class Started(Struct, frozen=True, tag=True):
    """Evaluation begins; `num_cached_tokens` of the prompt are not evaluated again.

    `restored` is the checkpoint that they come from. `followed_ms`: how long the request waited for
    another one to evaluate what both begin with; None: it went on from none in flight.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    restored: Found | None = None
    followed_ms: float | None = None


class Progress(Struct, frozen=True, tag=True):
    """Prompt evaluation goes on: tokens done (the cached ones included) of all."""

    num_done_tokens: int
    num_prompt_tokens: int


class TokenLogprobs(Struct, frozen=True):
    """Natural logarithms under the model's own distribution, best alternative first."""

    chosen: float
    alternatives: tuple[tuple[int, float], ...]


class Probed(Struct, frozen=True, tag=True):
    """What is likeliest to follow the prompt; comes before the first token, whatever that is.

    The evaluation went on from `num_restored_tokens` of a checkpoint, or began at 0; `born` is how
    its state came about.
    """

    num_restored_tokens: int
    born: Birth
    alternatives: tuple[tuple[int, float], ...]


class TokenSampled(Struct, frozen=True, tag=True):
    """One more token. A stop token is never reported."""

    token: int
    logprobs: TokenLogprobs | None = None


class Finished(Struct, frozen=True, tag=True):
    """The last event of a request that did not fail. `tokens` are those that were reported.

    Of the prompt, `num_cached_tokens` were not evaluated again, and a checkpoint has been kept
    that covers the first `num_kept_tokens` (0: none was taken).
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    tokens: tuple[int, ...]
    prompt_ms: float
    decode_ms: float
    num_kept_tokens: int = 0


class Failed(Struct, frozen=True, tag=True):
    """The last event of a request that failed."""

    error: QwendError


Event = Started | Progress | Probed | TokenSampled | Finished | Failed

Deliver = Callable[[Event], None]
"""Takes a request's events in order, on the engine's thread; must return at once, never raise."""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What a client may ask about the engine."""

    model_name: str
    context_length: int
    vocab_size: int
    num_parameters: int
    backend: str
    max_sequences: int


class Engine(Protocol):
    """The front door that api/ sees. Any thread may call it."""

    @property
    def info(self) -> EngineInfo:
        """What is served; constant."""
        ...

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request; `deliver` then gets Started … and one Finished or Failed.

        Idle work is never refused: a newer piece ends the older ones that it contains, and of too
        many the least urgent go, as "cancelled".

        Raises:
            PromptTooLong: the prompt leaves no room for one token.
            Overloaded: the queue is full.
            EngineStopped: no request is taken any more.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request within one step; it ends with Finished("cancelled"). Unknown: ignored."""
        ...
