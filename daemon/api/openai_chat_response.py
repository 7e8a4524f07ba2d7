"""The bodies that /v1/chat/completions answers with: one object, or chunks of a stream.

Owns the response's Structs and their encoding. Pure; event loop.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from daemon.api.cache_plan import CachePlan
from daemon.api.generation import EndReason, Outcome, Piece
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


class PromptDetails(Struct):
    """`cached_tokens` of the prompt were not evaluated again."""

    cached_tokens: int


class CompletionDetails(Struct):
    """`reasoning_tokens` of the reply came before its thinking was closed."""

    reasoning_tokens: int


class Usage(Struct):
    """Tokens; the cached ones are among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatCompletion(Struct, kw_only=True):
    """An answer in one piece."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
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
    cache_plan: CachePlan | UnsetType = UNSET


class Head(Struct, frozen=True):
    """What all chunks of an answer begin with."""

    id: str
    created: int
    model: str
    fingerprint: str


class ChunkWriter:
    """Encodes one stream's chunks."""

    def __init__(self, head: Head, tokenizer: Tokenizer, include_usage: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._encoder = msgspec.json.Encoder()
        self._usage: None | UnsetType = None if include_usage else UNSET

    def first(self) -> bytes:
        """The chunk that names the role; it goes out at once."""
        return self._chunk(ChunkChoice(0, DeltaOut(role="assistant", content="")))

    def piece(self, piece: Piece) -> list[bytes]:
        """A chunk a delta; for a sign of life one with an empty delta."""
        deltas = [_delta_out(delta) for delta in piece.deltas] or [DeltaOut()]
        choices = [ChunkChoice(0, delta) for delta in deltas]
        choices[0].logprobs = logprobs_out(piece.tokens, self._tokenizer)
        return [self._chunk(choice) for choice in choices]

    def last(self, reason: EndReason) -> bytes:
        """The chunk that says why the answer ended."""
        return self._chunk(ChunkChoice(0, DeltaOut(), None, reason))

    def usage(self, outcome: Outcome, plan: CachePlan | UnsetType = UNSET) -> bytes:
        """The chunk after the last, without choices; with the cache plan, if asked for."""
        return self._encode([], usage_out(outcome), plan)

    def _chunk(self, choice: ChunkChoice) -> bytes:
        return self._encode([choice], self._usage)

    def _encode(
        self,
        choices: list[ChunkChoice],
        usage: Usage | None | UnsetType,
        plan: CachePlan | UnsetType = UNSET,
    ) -> bytes:
        head = self._head
        return self._encoder.encode(
            ChatCompletionChunk(
                id=head.id,
                created=head.created,
                model=head.model,
                system_fingerprint=head.fingerprint,
                choices=choices,
                usage=usage,
                cache_plan=plan,
            )
        )


def completion_body(
    head: Head,
    pieces: Sequence[Piece],
    outcome: Outcome,
    tokenizer: Tokenizer,
    plan: CachePlan | UnsetType = UNSET,
) -> bytes:
    """A whole answer, encoded; with the cache plan, if asked for."""
    message = _message([delta for piece in pieces for delta in piece.deltas])
    tokens = [token for piece in pieces for token in piece.tokens]
    completion = ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.fingerprint,
        choices=[Choice(0, message, logprobs_out(tokens, tokenizer), outcome.reason)],
        usage=usage_out(outcome),
        cache_plan=plan,
    )
    return msgspec.json.encode(completion)


def usage_out(outcome: Outcome) -> Usage:
    """The token counts of a reply."""
    return Usage(
        outcome.num_prompt_tokens,
        outcome.num_reply_tokens,
        outcome.num_prompt_tokens + outcome.num_reply_tokens,
        PromptDetails(outcome.num_cached_tokens),
        CompletionDetails(outcome.num_reasoning_tokens),
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
