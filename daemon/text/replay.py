"""Sampled replies keep their exact tokens when they come back as text.

A model may sample a split of a text that the tokenizer would not choose; re-tokenised history then
leaves the checkpointed prefix. Owns what to remember of a reply and when a memory may stand for a
frame. Knows nothing of where memories are kept. Pure functions; any thread.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from daemon.text.template import FRAME_END
from daemon.text.tokenizer import Tokenizer

ReplayEntry = tuple[str, tuple[int, ...]]
"""A frame's text, and the tokens that a reply gave it."""


class Cut(Struct, frozen=True):
    """Where a reply was ended for its client: at a mark that its last token made whole."""

    mark: str
    keeps_mark: bool


class SampledTokens(Protocol):
    """Where remembered replies are kept; any thread may ask."""

    def recall(self, frame_text: str) -> tuple[int, ...] | None:
        """The tokens remembered for exactly this text."""
        ...


def replay_entries(
    tokenizer: Tokenizer, generation: Sequence[int], reply: Sequence[int]
) -> list[ReplayEntry]:
    """What to remember of a reply: its frame with the thinking and, if any, without.

    Args:
        generation: tokens of the generation prompt.
        reply: sampled tokens, with or without the stop token.

    Returns:
        One or two entries; none for a reply that is no valid UTF-8 or holds control tokens,
        since clients never see those and cannot send them back.
    """
    reply = _without_stop(tokenizer, reply)
    if any(map(tokenizer.is_control, reply)):
        return []
    frame = (*generation, *reply, *tokenizer.encode(FRAME_END))
    bare = _drop_thinking(tokenizer, frame)
    entries = [(_text(tokenizer, tokens), tokens) for tokens in (frame, bare) if tokens]
    return [(text, tokens) for text, tokens in entries if text is not None]


def shown_tokens(tokenizer: Tokenizer, reply: Sequence[int], cut: Cut | None) -> tuple[int, ...]:
    """Of sampled tokens those that the client was shown; one that was cut in two is encoded anew.

    Nothing when the mark is not there: then it stood in text that the parser had changed.
    """
    if cut is None:
        return tuple(_without_stop(tokenizer, reply))
    before = tokenizer.decode(reply[:-1])
    text = tokenizer.decode(reply)
    at = text.find(cut.mark, max(0, len(before) - len(cut.mark) + 1))
    if at < 0:
        return ()
    end = at + len(cut.mark) * cut.keeps_mark
    for num_kept in range(len(reply), -1, -1):
        kept = tokenizer.decode(reply[:num_kept])
        if len(kept) <= end and text.startswith(kept):
            return (*reply[:num_kept], *tokenizer.encode(text[len(kept) : end], special=False))
    return ()


def is_faithful(
    tokenizer: Tokenizer, text: str, canonical: Sequence[int], remembered: Sequence[int]
) -> bool:
    """Whether remembered tokens spell `text` and have exactly the control tokens of `canonical`."""
    return (
        all(0 <= token < tokenizer.num_real_tokens for token in remembered)
        and _control(tokenizer, remembered) == _control(tokenizer, canonical)
        and tokenizer.decode(remembered) == text
    )


def _without_stop(tokenizer: Tokenizer, reply: Sequence[int]) -> Sequence[int]:
    return reply[:-1] if reply and reply[-1] in tokenizer.stop_tokens else reply


def _drop_thinking(tokenizer: Tokenizer, frame: tuple[int, ...]) -> tuple[int, ...]:
    """The frame as templates write it once a newer question came; () without a clean joint."""
    opening, closing = tokenizer.encode("<think>"), tokenizer.encode("</think>")
    if len(opening) != 1 or len(closing) != 1 or opening[0] not in frame:
        return ()
    start = frame.index(opening[0])
    if closing[0] not in frame[start:]:
        return ()
    rest = frame.index(closing[0], start) + 1
    for stop in (rest + 1, rest + 2):
        if tokenizer.decode_bytes(frame[rest:stop]) == b"\n\n":
            return frame[:start] + frame[stop:]
    return ()


def _text(tokenizer: Tokenizer, tokens: Iterable[int]) -> str | None:
    try:
        return tokenizer.decode_bytes(tokens).decode()
    except UnicodeDecodeError:
        return None


def _control(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[int]:
    return [token for token in tokens if tokenizer.is_control(token)]
