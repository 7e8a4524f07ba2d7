"""The bodies that /v1/chat/completions answers with: one object, or chunks of a stream.

Owns the response's Structs and their encoding. Pure; event loop.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from daemon.api.cache_plan import CachePlan
from daemon.api.errors import openai_error
from daemon.api.openai_usage import (
    ProgressOut,
    Timings,
    Usage,
    progress_out,
    timings_of,
    usage_of,
)
from daemon.api.reply_pieces import EndReason, Outcome, Piece, PromptProgress
from daemon.api.sse import DONE, frame
from daemon.engine.requests import TokenLogprobs, TokenSampled
from daemon.text.reply_parser import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from daemon.text.tokenizer import Tokenizer


class Function(Struct):
    """A call's function; `arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCallOut(Struct, omit_defaults=True):
    """A tool call; `index` is set in chunks only."""

    id: str
    function: Function
    type: str = ""
    index: int | UnsetType = UNSET


class MessageOut(Struct):
    """The whole answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class DeltaOut(Struct, omit_defaults=True):
    """A part of the answer; all of it may be absent."""

    role: str = ""
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class Alternative(Struct):
    """A token that could have been sampled, with its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenOut(Struct):
    """A sampled token with its log-probability and those of the likeliest."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class LogprobsOut(Struct):
    """Every sampled token in order: of reasoning and tool calls too, and of what marks them."""

    content: list[TokenOut]
    refusal: None = None


class Choice(Struct):
    """The one choice of an answer."""

    index: int
    message: MessageOut
    logprobs: LogprobsOut | None
    finish_reason: EndReason


class ChunkChoice(Struct):
    """The one choice of a chunk."""

    index: int
    delta: DeltaOut
    logprobs: LogprobsOut | None = None
    finish_reason: EndReason | None = None


class ChatCompletion(Struct, kw_only=True):
    """An answer in one piece."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    timings: Timings
    cache_plan: CachePlan | UnsetType = UNSET


class ChatCompletionChunk(Struct, kw_only=True):
    """A part of a streamed answer; `usage` is absent unless asked for, null but in the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_progress: ProgressOut | UnsetType = UNSET
    cache_plan: CachePlan | UnsetType = UNSET


class Head(Struct, frozen=True):
    """What all chunks of an answer begin with."""

    id: str
    created: int
    model: str
    fingerprint: str


class ChatWriter:
    """Spells one reply.

    Args:
        include_usage: a chunk without choices at the end of a stream says what it cost.
        progress: chunks with `prompt_progress` tell how far the prompt is.
        explain: the end carries the cache plan.
    """

    def __init__(
        self,
        head: Head,
        tokenizer: Tokenizer,
        *,
        include_usage: bool = False,
        progress: bool = False,
        explain: bool = False,
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._progress = progress
        self._explain = explain
        self._encoder = msgspec.json.Encoder()
        empty = self._encoder.encode(self._chunk([]))
        before, _, self._after = empty.rpartition(b"[]")
        self._before = b"data: " + before + b"["
        self._after = b"]" + self._after + b"\n\n"

    def begin(self) -> bytes:
        """The chunk that names the role; it goes out at once."""
        return self._frame(ChunkChoice(0, DeltaOut(role="assistant", content="")))

    def piece(self, piece: Piece) -> bytes:
        """A chunk a delta; for a sign of life one with an empty delta."""
        if piece.progress is not None and not (piece.deltas or piece.tokens):
            return self._progress_chunk(piece.progress)
        deltas = [_delta_out(delta) for delta in piece.deltas] or [DeltaOut()]
        choices = [ChunkChoice(0, delta) for delta in deltas]
        if piece.tokens:
            choices[0].logprobs = logprobs_out(piece.tokens, self._tokenizer)
        return b"".join(map(self._frame, choices))

    def end(self, outcome: Outcome) -> bytes:
        """The chunk that says why the answer ended, that of the usage, and the mark of the end."""
        last = self._chunk([ChunkChoice(0, DeltaOut(), None, outcome.reason)])
        last.timings = timings_of(outcome)
        events = [frame(self._encoder.encode(last))]
        if self._include_usage or self._explain:
            chunk = self._chunk([])
            chunk.usage = usage_of(outcome)
            chunk.cache_plan = outcome.plan if self._explain else UNSET
            events.append(frame(self._encoder.encode(chunk)))
        return b"".join((*events, DONE))

    def error(self, error: Exception) -> bytes:
        """The event that ends a broken stream."""
        return frame(openai_error(error))

    def whole(self, pieces: Sequence[Piece], outcome: Outcome) -> bytes:
        """The answer in one piece."""
        message = _message([delta for piece in pieces for delta in piece.deltas])
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = logprobs_out(tokens, self._tokenizer)
        completion = ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=[Choice(0, message, logprobs, outcome.reason)],
            usage=usage_of(outcome),
            timings=timings_of(outcome),
            cache_plan=outcome.plan if self._explain else UNSET,
        )
        return self._encoder.encode(completion)

    def _frame(self, choice: ChunkChoice) -> bytes:
        """All that is the same in every chunk has been encoded once."""
        return self._before + self._encoder.encode(choice) + self._after

    def _progress_chunk(self, progress: PromptProgress) -> bytes:
        if not self._progress:
            return b""
        chunk = self._chunk([ChunkChoice(0, DeltaOut())])
        chunk.prompt_progress = progress_out(progress)
        return frame(self._encoder.encode(chunk))

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=choices,
            usage=None if self._include_usage else UNSET,
        )


def logprobs_out(tokens: Sequence[TokenSampled], tokenizer: Tokenizer) -> LogprobsOut | None:
    """The log-probabilities of tokens that carry them; None when there are none."""
    reported = [(t.token, t.logprobs) for t in tokens if t.logprobs is not None]
    if not reported:
        return None
    return LogprobsOut([_token_out(token, found, tokenizer) for token, found in reported])


def _token_out(token: int, logprobs: TokenLogprobs, tokenizer: Tokenizer) -> TokenOut:
    chosen = _alternative(token, logprobs.chosen, tokenizer)
    others = [_alternative(other, value, tokenizer) for other, value in logprobs.alternatives]
    return TokenOut(chosen.token, chosen.logprob, chosen.bytes, others)


def _alternative(token: int, logprob: float, tokenizer: Tokenizer) -> Alternative:
    spelled = tokenizer.token_bytes(token)
    # JSON has no infinity; OpenAI writes -9999 for a token that cannot be sampled.
    return Alternative(spelled.decode("utf-8", "replace"), max(logprob, -9999.0), list(spelled))


def _message(deltas: Sequence[Delta]) -> MessageOut:
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls = [_call_out(delta, UNSET) for delta in deltas if isinstance(delta, ToolCallDelta)]
    return MessageOut(
        "assistant",
        content=content or (None if calls else ""),
        reasoning_content=reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def _delta_out(delta: Delta) -> DeltaOut:
    match delta:
        case ContentDelta():
            return DeltaOut(content=delta.text)
        case ReasoningDelta():
            return DeltaOut(reasoning_content=delta.text)
        case ToolCallDelta():
            return DeltaOut(tool_calls=[_call_out(delta, delta.index)])


def _call_out(call: ToolCallDelta, index: int | UnsetType) -> ToolCallOut:
    return ToolCallOut(call.id, Function(call.name, call.arguments), "function", index)
