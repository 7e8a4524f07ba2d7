"""What comes out of a generation, for every dialect: pieces of a reply, and how it ended.

Owns the types only. Frozen; event loop.
"""

from typing import Literal

from msgspec import Struct

from daemon.api.cache_plan import CachePlan
from daemon.engine.requests import TokenSampled
from daemon.text.reply_parser import Delta

EndReason = Literal["stop", "length", "tool_calls"]


class PromptProgress(Struct, frozen=True, kw_only=True):
    """How far the prompt's evaluation is: tokens done, the cached ones included."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_done_tokens: int
    elapsed_ms: float


class Piece(Struct, frozen=True):
    """What is new in a reply. With nothing at all: a sign of life after a long silence.

    `tokens` are those with log-probabilities sampled since the last piece, if asked for.
    `progress` comes when the evaluation of the prompt begins, and as it goes on if asked for.
    """

    deltas: tuple[Delta, ...] = ()
    tokens: tuple[TokenSampled, ...] = ()
    progress: PromptProgress | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    """How a reply ended, in tokens and milliseconds.

    `stop` is the client's stop string that ended it, or "". `num_written_tokens` of the prompt
    were evaluated and are in the store from now on. `plan` says why not more was reused.
    """

    reason: EndReason
    stop: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_written_tokens: int
    num_reply_tokens: int
    num_reasoning_tokens: int
    prompt_ms: float
    decode_ms: float
    plan: CachePlan
