"""What /v1/completions answers with: one object, or chunks of a stream.

Owns the response's Structs and their encoding. Pure; event loop.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from daemon.api.errors import openai_error
from daemon.api.openai_chat_response import Head
from daemon.api.openai_completions_group import ChoicePiece
from daemon.api.openai_usage import Timings, Usage, timings_of, usage_sum
from daemon.api.reply_pieces import Outcome
from daemon.api.sse import DONE, frame
from daemon.engine.requests import TokenSampled
from daemon.text.reply_parser import ToolCallDelta
from daemon.text.tokenizer import Tokenizer

TextReason = Literal["stop", "length"]


class TextLogprobs(Struct):
    """Every sampled token: its text, where that begins, and natural logarithms."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Struct):
    """One choice, or what is new of it."""

    text: str
    index: int
    logprobs: TextLogprobs | None = None
    finish_reason: TextReason | None = None


class TextCompletion(Struct, kw_only=True):
    """An answer, or a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class CompletionWriter:
    """Spells the choices of one request.

    Args:
        echoes: the text that each choice begins with.
    """

    def __init__(
        self, head: Head, tokenizer: Tokenizer, echoes: Sequence[str], *, include_usage: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._include_usage = include_usage
        self._encoder = msgspec.json.Encoder()
        self._lengths = [len(echo) for echo in echoes]

    def begin(self) -> bytes:
        """What is echoed."""
        echoed = (TextChoice(text, index) for index, text in enumerate(self._echoes) if text)
        return b"".join(map(self._chunk, echoed))

    def piece(self, piece: ChoicePiece) -> bytes:
        """A chunk of one choice; an empty one for a sign of life."""
        if piece.piece.progress is not None and not piece.piece.deltas:
            return b""
        return self._chunk(self._choice(piece))

    def end(self, outcomes: Sequence[Outcome]) -> bytes:
        """Why each choice ended, what it cost, and the mark of the end."""
        last = [TextChoice("", i, None, _reason(done)) for i, done in enumerate(outcomes)]
        events = [self._chunk(choice) for choice in last]
        if self._include_usage:
            chunk = self._completion([])
            chunk.usage = usage_sum(outcomes)
            chunk.timings = _timings(outcomes)
            events.append(frame(self._encoder.encode(chunk)))
        return b"".join((*events, DONE))

    def error(self, error: Exception) -> bytes:
        """The event that ends a broken stream."""
        return frame(openai_error(error))

    def whole(self, pieces: Sequence[ChoicePiece], outcomes: Sequence[Outcome]) -> bytes:
        """The answer in one piece."""
        choices = [
            TextChoice(echo, index, None, _reason(outcome))
            for index, (echo, outcome) in enumerate(zip(self._echoes, outcomes, strict=True))
        ]
        for piece in pieces:
            new, choice = self._choice(piece), choices[piece.index]
            choice.text += new.text
            choice.logprobs = _joined(choice.logprobs, new.logprobs)
        completion = self._completion(choices)
        completion.usage = usage_sum(outcomes)
        completion.timings = _timings(outcomes)
        return self._encoder.encode(completion)

    def _choice(self, piece: ChoicePiece) -> TextChoice:
        deltas = piece.piece.deltas
        text = "".join(delta.text for delta in deltas if not isinstance(delta, ToolCallDelta))
        logprobs = self._logprobs(piece.piece.tokens, self._lengths[piece.index])
        self._lengths[piece.index] += len(text)
        return TextChoice(text, piece.index, logprobs)

    def _logprobs(self, tokens: Sequence[TokenSampled], offset: int) -> TextLogprobs | None:
        if not tokens:
            return None
        found = TextLogprobs([], [], [], [])
        for token in tokens:
            assert token.logprobs is not None
            text = self._text(token.token)
            found.tokens.append(text)
            # JSON has no infinity; OpenAI writes -9999 for a token that cannot be sampled.
            found.token_logprobs.append(max(token.logprobs.chosen, -9999.0))
            found.top_logprobs.append(
                {self._text(t): max(value, -9999.0) for t, value in token.logprobs.alternatives}
            )
            found.text_offset.append(offset)
            offset += len(text)
        return found

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _chunk(self, choice: TextChoice) -> bytes:
        chunk = self._completion([choice])
        chunk.usage = None if self._include_usage else UNSET
        return frame(self._encoder.encode(chunk))

    def _completion(self, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=choices,
        )


def _joined(before: TextLogprobs | None, new: TextLogprobs | None) -> TextLogprobs | None:
    if before is None or new is None:
        return before or new
    return TextLogprobs(
        before.tokens + new.tokens,
        before.token_logprobs + new.token_logprobs,
        before.top_logprobs + new.top_logprobs,
        before.text_offset + new.text_offset,
    )


def _reason(outcome: Outcome) -> TextReason:
    return "length" if outcome.reason == "length" else "stop"


def _timings(outcomes: Sequence[Outcome]) -> Timings | UnsetType:
    """Of several choices, which ran side by side, times have no sum."""
    return timings_of(outcomes[0]) if len(outcomes) == 1 else UNSET
