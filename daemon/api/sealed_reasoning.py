"""Reasoning as an opaque string that clients keep and send back unchanged.

Owns the form of Anthropic's thinking signatures and of OpenAI's encrypted reasoning content. It is
no secret from the client, whose own reasoning it is; it brings back the exact text where a client
trims or omits the visible one, so that the prompt's prefix stays the same. Pure.
"""

import base64
import binascii
import zlib

MARK = "qwend1."
MAX_BYTES = 16 * 2**20
"""What a seal may unpack to; a longer one is not ours."""


def seal(reasoning: str) -> str:
    """The opaque string; ASCII."""
    packed = zlib.compress(reasoning.encode("utf-8", "surrogatepass"), 1)
    return MARK + base64.urlsafe_b64encode(packed).decode()


def unseal(sealed: str | None) -> str | None:
    """The reasoning; None when the string is of another server, or damaged."""
    if not sealed or not sealed.startswith(MARK):
        return None
    try:
        packed = base64.urlsafe_b64decode(sealed.removeprefix(MARK))
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, MAX_BYTES)
        return text.decode() if unpacker.eof else None
    except (binascii.Error, zlib.error, ValueError):
        return None
