"""Sampled replies keep their exact tokens when they come back as text.

A model may sample a split of a text that the tokenizer would not choose, or spell a call otherwise
than the template does; re-tokenised history then leaves the checkpointed prefix. Owns what to
remember of a reply and when a memory may stand for a frame. Knows nothing of where memories are
kept. Pure functions; any thread.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from daemon.text.messages import Message, ToolSpec
from daemon.text.reply_key import Form, reply_key, said
from daemon.text.reply_message import read_reply
from daemon.text.template import FRAME_END, FRAME_START
from daemon.text.tokenizer import Tokenizer

ReplayEntry = tuple[str, tuple[int, ...]]
"""A frame's text, or what it says as a key, and the tokens that a reply gave it."""

ASSISTANT = f"{FRAME_START}assistant\n"
THINK, THINK_END = "<think>", "</think>"


class Cut(Struct, frozen=True):
    """Where a reply was ended for its client: at a mark that its last token made whole."""

    mark: str
    keeps_mark: bool


class SampledTokens(Protocol):
    """Where remembered replies are kept; any thread may ask."""

    def recall(self, frame_text: str) -> tuple[int, ...] | None:
        """The tokens remembered for exactly this text, or key."""
        ...


def replay_entries(
    tokenizer: Tokenizer,
    generation: Sequence[int],
    reply: Sequence[int],
    tools: Sequence[ToolSpec] = (),
    before: str = "",
) -> list[ReplayEntry]:
    """What to remember of a reply: its frame with the thinking and, if any, without.

    Each by its text, and by what it says; the one with the thinking also by what was said before
    it, for clients that send no thinking back.

    Args:
        generation: tokens of the generation prompt.
        reply: sampled tokens, with or without the stop token.
        tools: what could be called; they give the arguments their types.
        before: the digest of the messages before it, see `reply_key.digests`.

    Returns:
        None for a reply that is no valid UTF-8 or holds control tokens, since clients never see
        those and cannot send them back.
    """
    reply = _without_stop(tokenizer, reply)
    if any(map(tokenizer.is_control, reply)):
        return []
    frame = (*generation, *reply, *tokenizer.encode(FRAME_END))
    text = _text(tokenizer, frame)
    if text is None:
        return []
    bare = _drop_thinking(tokenizer, frame)
    entries = [(text, frame)]
    message = read_frame(text, tools)
    form = frame_form(text)
    if message is not None and form is not None:
        silent = msgspec.structs.replace(message, reasoning=None)
        keys = {reply_key(message, form, before), reply_key(silent, form, before)}
        entries += [(key, frame) for key in sorted(keys)]
        entries += [(reply_key(message, "bare", before), bare)] if bare else []
    return entries + [(bare_text, bare) for bare_text in [_text(tokenizer, bare)] if bare_text]


def frame_form(text: str) -> Form | None:
    """The form of an assistant's frame; None while its thinking is not closed."""
    if not text.startswith(ASSISTANT + THINK):
        return "bare"
    return "full" if THINK_END in text else None


def read_frame(text: str, tools: Sequence[ToolSpec]) -> Message | None:
    """What an assistant's frame says; None when it is no such frame."""
    if not (text.startswith(ASSISTANT) and text.endswith(FRAME_END)):
        return None
    inner = text.removeprefix(ASSISTANT).removesuffix(FRAME_END)
    return read_reply(inner, tools, thinking_open=False)


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
        _are_tokens(tokenizer, remembered)
        and _control(tokenizer, remembered) == _control(tokenizer, canonical)
        and tokenizer.decode(remembered) == text
    )


def says_the_same(
    tokenizer: Tokenizer,
    message: Message,
    form: Form,
    canonical: Sequence[int],
    remembered: Sequence[int],
    tools: Sequence[ToolSpec],
) -> bool:
    """Whether remembered tokens say in this form what a message does, with other spelling.

    They must have exactly the control tokens of `canonical`; thinking that the client sent must be
    the same.
    """
    text = _text(tokenizer, remembered) if _are_tokens(tokenizer, remembered) else None
    found = None if text is None else read_frame(text, tools)
    return (
        text is not None
        and found is not None
        and frame_form(text) == form
        and _control(tokenizer, remembered) == _control(tokenizer, canonical)
        and said(found) == said(message)
        and (form == "bare" or _has_thinking_of(message, found))
    )


def _has_thinking_of(message: Message, found: Message) -> bool:
    given = (message.reasoning or "").strip()
    return not given or given == (found.reasoning or "").strip()


def _are_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
    return all(0 <= token < tokenizer.num_real_tokens for token in tokens)


def _without_stop(tokenizer: Tokenizer, reply: Sequence[int]) -> Sequence[int]:
    return reply[:-1] if reply and reply[-1] in tokenizer.stop_tokens else reply


def _drop_thinking(tokenizer: Tokenizer, frame: tuple[int, ...]) -> tuple[int, ...]:
    """The frame as templates write it once a newer question came; () without a clean joint."""
    opening, closing = tokenizer.encode(THINK), tokenizer.encode(THINK_END)
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
