"""Reasoning as an opaque string that clients keep and send back unchanged.

Owns the form of Anthropic's thinking signatures and of OpenAI's encrypted reasoning content. It is
no secret from the client, whose own reasoning it is; it brings back the exact text where a client
trims or omits the visible one, so that the prompt's prefix stays the same. Not compressed, so that
what comes in is never larger than it looks. Pure.
"""

import base64
import binascii

import xxhash

MARK = "qwend1"


def seal(reasoning: str) -> str:
    """The opaque string; ASCII, a third longer than the text."""
    text = reasoning.encode("utf-8", "surrogatepass")
    return f"{MARK}.{_checksum(text)}.{base64.urlsafe_b64encode(text).decode()}"


def unseal(sealed: str | None) -> str | None:
    """The reasoning; None when the string is of another server, or damaged."""
    mark, _, rest = (sealed or "").partition(".")
    checksum, _, packed = rest.partition(".")
    if mark != MARK:
        return None
    try:
        text = base64.b64decode(packed, altchars=b"-_", validate=True)
        return text.decode() if _checksum(text) == checksum else None
    except (binascii.Error, ValueError):
        return None


def _checksum(text: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(text)
