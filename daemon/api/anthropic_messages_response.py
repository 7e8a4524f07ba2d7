"""What /v1/messages answers with: one message, or the events of a stream.

Owns the response's Structs and their encoding. Pure but for a clock; event loop.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from daemon.api.cache_plan import CachePlan, anthropic_miss_reason
from daemon.api.errors import anthropic_error
from daemon.api.reply_pieces import Outcome, Piece, PromptProgress
from daemon.api.sealed_reasoning import seal
from daemon.api.sse import frame
from daemon.text.reply_parser import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

PING = frame(b'{"type":"ping"}', b"ping")
QUIET_S = 2.0
"""Thinking that is not shown gives a sign of life at this distance, in seconds."""

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    """Reasoning; the signature brings its exact text back."""

    thinking: str
    signature: str


class TextBlock(Struct, tag_field="type", tag="text"):
    """A part of the answer."""

    text: str
    citations: None = None


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    """A call; `input` is a JSON object."""

    id: str
    name: str
    input: Raw


BlockOut = ThinkingBlock | TextBlock | ToolUseBlock


class OutputDetails(Struct):
    """`thinking_tokens` of the reply came before its thinking was closed."""

    thinking_tokens: int


class UsageOut(Struct):
    """Tokens; unlike OpenAI's, the first three have no token in common and add up to the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputDetails
    service_tier: str = "standard"


class MissReason(Struct):
    """Why tokens that had been seen were evaluated again."""

    type: str
    cache_missed_input_tokens: int


class DiagnosticsOut(Struct):
    """Null reason: nothing was lost."""

    cache_miss_reason: MissReason | None


class MessageOut(Struct, kw_only=True):
    """The whole answer; in the first event of a stream without content and reason."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[BlockOut]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: UsageOut
    diagnostics: DiagnosticsOut | None | UnsetType = UNSET


class InputTokens(Struct):
    """The length of a prompt."""

    input_tokens: int
    object: str | UnsetType = UNSET


class MessageWriter:
    """Spells one reply.

    Args:
        shows_thinking: else only the signatures carry it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        message_id: str,
        model: str,
        num_prompt_tokens: int,
        *,
        shows_thinking: bool = True,
        diagnoses: bool = False,
        follows: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._id = message_id
        self._model = model
        self._num_prompt = num_prompt_tokens
        self._shows_thinking = shows_thinking
        self._diagnoses = diagnoses
        self._follows = follows
        self._clock = clock
        self._sent_s = clock()
        self._encoder = msgspec.json.Encoder()
        self._started = False
        self._open: type[Delta] | None = None
        self._index = -1
        self._reasoning: list[str] = []

    def begin(self) -> bytes:
        """Nothing: the first event tells what is cached, which is known once evaluation begins."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """The piece's events; a ping for a sign of life."""
        events = [*self._start(piece.progress)]
        for delta in piece.deltas:
            events += self._delta(delta)
        is_silence = not (piece.deltas or piece.tokens or piece.progress)
        if is_silence or (not events and self._clock() - self._sent_s > QUIET_S):
            events.append(PING)
        if events:
            self._sent_s = self._clock()
        return b"".join(events)

    def end(self, outcome: Outcome) -> bytes:
        """The events that close the message, with what it cost."""
        delta = {
            "stop_reason": _stop_reason(outcome),
            "stop_sequence": outcome.stop or None,
            "stop_details": None,
            "container": None,
        }
        closing = {"delta": delta, "usage": _usage(outcome)}
        if self._diagnoses:
            closing["diagnostics"] = self._diagnostics(outcome.plan)
        return b"".join(
            (
                *self._start(None),
                *self._close(),
                self._event("message_delta", **closing),
                self._event("message_stop"),
            )
        )

    def error(self, error: Exception) -> bytes:
        """The event that ends a broken stream."""
        return frame(anthropic_error(error), b"error")

    def whole(self, pieces: Sequence[Piece], outcome: Outcome) -> bytes:
        """The answer in one piece."""
        deltas = [delta for piece in pieces for delta in piece.deltas]
        message = MessageOut(
            id=self._id,
            model=self._model,
            content=list(self._blocks(deltas)),
            stop_reason=_stop_reason(outcome),
            stop_sequence=outcome.stop or None,
            usage=_usage(outcome),
            diagnostics=self._diagnostics(outcome.plan) if self._diagnoses else UNSET,
        )
        return self._encoder.encode(message)

    def _diagnostics(self, plan: CachePlan) -> DiagnosticsOut:
        reason = anthropic_miss_reason(plan)
        # Who names no earlier message, as in a first turn, misses none.
        if reason is None or (plan.cause == "never_seen" and not self._follows):
            return DiagnosticsOut(None)
        return DiagnosticsOut(MissReason(*reason))

    def _start(self, progress: PromptProgress | None) -> Iterator[bytes]:
        if self._started:
            return
        self._started = True
        num_cached = progress.num_cached_tokens if progress is not None else 0
        usage = UsageOut(self._num_prompt - num_cached, 0, num_cached, 0, OutputDetails(0))
        message = MessageOut(
            id=self._id,
            model=self._model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=usage,
        )
        yield self._event("message_start", message=message)

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        match delta:
            case ReasoningDelta(text):
                yield from self._enter(ReasoningDelta, ThinkingBlock("", ""))
                self._reasoning.append(text)
                if self._shows_thinking:
                    yield self._block_delta(type="thinking_delta", thinking=text)
            case ContentDelta(text):
                yield from self._enter(ContentDelta, TextBlock(""))
                yield self._block_delta(type="text_delta", text=text)
            case ToolCallDelta():
                yield from self._close()
                call = ToolUseBlock(tool_use_id(delta.id), delta.name, Raw(b"{}"))
                yield from self._enter(ToolCallDelta, call)
                yield self._block_delta(type="input_json_delta", partial_json=delta.arguments)
                yield from self._close()

    def _enter(self, kind: type[Delta], block: BlockOut) -> Iterator[bytes]:
        if self._open is kind:
            return
        yield from self._close()
        self._open = kind
        self._index += 1
        yield self._event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open is ReasoningDelta:
            signature = seal("".join(self._reasoning))
            self._reasoning.clear()
            yield self._block_delta(type="signature_delta", signature=signature)
        yield self._event("content_block_stop", index=self._index)
        self._open = None

    def _block_delta(self, **delta: str) -> bytes:
        return self._event("content_block_delta", index=self._index, delta=delta)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return frame(self._encoder.encode({"type": kind, **fields}), kind.encode())

    def _blocks(self, deltas: Sequence[Delta]) -> Iterator[BlockOut]:
        at = 0
        while at < len(deltas):
            first, stop = deltas[at], at + 1
            while stop < len(deltas) and type(deltas[stop]) is type(first):
                stop += 1
            if isinstance(first, ToolCallDelta):
                stop = at + 1
                arguments = Raw(first.arguments.encode())
                yield ToolUseBlock(tool_use_id(first.id), first.name, arguments)
            else:
                run = deltas[at:stop]
                text = "".join(part.text for part in run if not isinstance(part, ToolCallDelta))
                shown = text if self._shows_thinking else ""
                is_content = isinstance(first, ContentDelta)
                yield TextBlock(text) if is_content else ThinkingBlock(shown, seal(text))
            at = stop


def tool_use_id(call_id: str) -> str:
    """A call's id as Anthropic's clients know them."""
    return "toolu_" + call_id.removeprefix("call_")


def _stop_reason(outcome: Outcome) -> StopReason:
    if outcome.stop:
        return "stop_sequence"
    reasons: dict[str, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}
    return reasons.get(outcome.reason, "end_turn")


def _usage(outcome: Outcome) -> UsageOut:
    num_plain = outcome.num_prompt_tokens - outcome.num_cached_tokens - outcome.num_written_tokens
    return UsageOut(
        num_plain,
        outcome.num_written_tokens,
        outcome.num_cached_tokens,
        outcome.num_reply_tokens,
        OutputDetails(outcome.num_reasoning_tokens),
    )
