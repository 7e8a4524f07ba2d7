"""Where a long text is likely to part from another like it: at its paragraphs and definitions.

Owns the search in tokens, so that what was sampled and what was encoded are read alike. Knows no
messages and no store. Pure functions; any thread.
"""

from collections.abc import Iterable, Iterator, Sequence

OPENING = b'{"type": "function", "function": {"name": "'
"""What the definitions of all tools begin with."""

_SPACE = b" \t\r\n"


def section_starts(pieces: Iterable[bytes], *, with_definitions: bool) -> Iterator[int]:
    """Where the sections behind the first begin, as indices of tokens; of a definition also where
    it may first differ from another.

    Args:
        pieces: the bytes of each token.
        with_definitions: a line that begins with `{` counts too, not only what follows an empty
            line: templates show each tool as a line of JSON.
    """
    pieces = tuple(pieces)
    num_newlines = begin = 0
    for index, piece in enumerate(pieces):
        body = piece.lstrip(_SPACE)
        if leading := piece[: len(piece) - len(body)].count(b"\n"):
            num_newlines, begin = num_newlines + leading, index + 1
        if not body:
            continue
        is_definition = with_definitions and num_newlines > 0 and body.startswith(b"{")
        if num_newlines > 1 or is_definition:
            yield min(begin, index)
        if is_definition and (num_common := _num_common(pieces[index : index + len(OPENING)])):
            yield index + num_common
        num_newlines, begin = body[len(body.rstrip(_SPACE)) :].count(b"\n"), index + 1


def _num_common(pieces: Sequence[bytes]) -> int:
    """Tokens that lie whole in what all definitions begin with."""
    text = b""
    for number, piece in enumerate(pieces):
        text += piece
        if not OPENING.startswith(text):
            return number
    return len(pieces)
