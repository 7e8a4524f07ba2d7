"""The hash chain over a prompt's pages, which names every stored page and state.

Owns the hash and nothing else: no store, no thread of its own. Each link covers PAGE_TOKENS token
ids and the link before it; the first begins from the model's fingerprint, so that models never
share a name. xxh3 resists accidents, not attackers: token ids are compared at load too.
"""

import struct
import sys
from array import array
from collections.abc import Mapping, Sequence

import xxhash

from daemon.checkpoint import PAGE_TOKENS

HASH_BYTES = 16
TOKEN_BYTES = 4


def fingerprint(parts: Mapping[str, bytes]) -> bytes:
    """Name a model by all that its states depend on; 16 bytes, whatever the order of `parts`."""
    digest = xxhash.xxh3_128()
    for name, content in sorted(parts.items()):
        for field in (name.encode(), content):
            digest.update(struct.pack("<Q", len(field)))
            digest.update(field)
    return digest.digest()


class PrefixChain:
    """The chain of one growing token sequence.

    `hashes[i]` names the prefix of (i + 1) * PAGE_TOKENS tokens. Tokens beyond the last whole page
    wait for the page to fill.

    Args:
        fingerprint: 16 bytes that name the model.
        tokens: ids in [0, 2**32).
    """

    def __init__(self, fingerprint: bytes, tokens: Sequence[int] = ()) -> None:
        assert len(fingerprint) == HASH_BYTES
        self.hashes: list[bytes] = []
        self._fingerprint = fingerprint
        self._tokens = array("I")
        self.extend(tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those of the unfinished page included."""
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; hashes the pages that they complete."""
        self._tokens.extend(tokens)
        for index in range(len(self.hashes), len(self._tokens) // PAGE_TOKENS):
            parent = self.hashes[-1] if index else self._fingerprint
            self.hashes.append(link(parent, self.page_tokens(index)))

    def page_tokens(self, index: int) -> bytes:
        """The token ids of a whole page, little-endian u32, 256 bytes."""
        return self.token_bytes(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)

    def token_bytes(self, start: int, stop: int) -> bytes:
        """The token ids of [start, stop), little-endian u32."""
        piece = self._tokens[start:stop]
        if sys.byteorder == "big":
            piece.byteswap()
        return piece.tobytes()


def link(parent: bytes, page_tokens: bytes) -> bytes:
    """The hash of a page: xxh3-128 of the hash before it (or the fingerprint) and its tokens."""
    return xxhash.xxh3_128_digest(parent + page_tokens)
