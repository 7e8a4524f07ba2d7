"""Client strings on their way through a chat template: what they spell never steers the model.

Owns the marks put into strings before rendering and taken out after it. Knows nothing of jinja or
of token ids. Immutable; any thread.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

BREAK = "\ufdd0"
PLACE = "\ufdd1"
MARKS = re.compile(f"{BREAK}({BREAK}?)")
PLACEHOLDER = re.compile(f"{PLACE}(\\d+){PLACE}")


class Segment(Struct, frozen=True):
    """A piece of a prompt. In a literal one, control tokens are ordinary text."""

    text: str
    literal: bool


class Guard:
    """Breaks control tokens in client strings by a noncharacter after their first letter.

    A noncharacter survives trimming, JSON and comparison; one that a client typed is doubled, so
    that `segments` gives back exactly what came in.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        spelled = "|".join(map(re.escape, tokens))
        self._control = re.compile(f"({spelled})")
        self._to_break = re.compile(f"[{BREAK}{PLACE}]|{spelled}")
        self._prefixes = {token[:size] for token in tokens for size in range(1, len(token))}
        self._longest = max(map(len, self._prefixes), default=0)

    def protect(self, value: Any) -> Any:
        """A copy of a JSON-like value with every string in it, keys included, made harmless."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item) for item in value]
        return value

    def segments(self, rendered: str) -> tuple[Segment, ...]:
        """Rendered text without marks; literal where a client spelled a control token.

        A literal segment reaches from one real control token to the next, so that its tokens are
        those of ordinary text.
        """
        pieces: list[Segment] = []
        plain: list[str] = []
        for run in self._control.split(rendered):
            if BREAK in run:
                pieces += [Segment("".join(plain), False), Segment(MARKS.sub(r"\1", run), True)]
                plain = []
            else:
                plain.append(run)
        pieces.append(Segment("".join(plain), False))
        return tuple(piece for piece in pieces if piece.text)

    def _protect_text(self, text: str) -> str:
        text = self._to_break.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)
        cut = len(text) - self._open_tail(text)
        return text if cut == len(text) else text[: cut + 1] + BREAK + text[cut + 1 :]

    def _open_tail(self, text: str) -> int:
        """Length of the end that a template's next character might complete to a token."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        return next((size for size in sizes if text[-size:] in self._prefixes), 0)


def placeholder(number: int) -> str:
    """Text that a template passes through and no client can spell, to find a place again."""
    return f"{PLACE}{number}{PLACE}"
