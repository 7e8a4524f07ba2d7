"""The vocabulary and merges of a GGUF file's metadata, checked; nothing is encoded here.

Owns the metadata's keys and the kinds of tokens. Knows nothing of the file around the metadata.
Immutable; any thread.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from msgspec import Struct

from daemon.errors import ModelFileError, UnsupportedModel

REPLY_TAGS = frozenset(
    f"<{slash}{tag}>" for tag in ("think", "tool_call", "tool_response") for slash in ("", "/")
)
"""Tags that a reply is parsed by. They count as user-defined, whatever a file declares them."""

STOP_NAMES = ("<|im_end|>", "<|endoftext|>")
STOP_KEYS = ("eos_token_id", "eot_token_id")


class TokenKind(IntEnum):
    """The values of `tokenizer.ggml.token_type` that a byte-level vocabulary uses."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


class Vocabulary(Struct, frozen=True):
    """What a file says about its tokens; row i is token i.

    `names` are in the byte-level alphabet for normal tokens and plain text for all others.
    """

    names: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[tuple[str, str]]
    stop_tokens: frozenset[int]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        """Read and check the `tokenizer.ggml.*` values.

        Raises:
            ModelFileError: a value is absent or contradicts another.
            UnsupportedModel: another kind of tokenizer.
        """
        _require(metadata, "model", "gpt2")
        _require(metadata, "pre", "qwen35")
        names = _array(metadata, "tokens", str)
        kinds = _array(metadata, "token_type", int)
        if len(kinds) != len(names):
            raise ModelFileError(
                f"The file has {len(names)} tokens, but tokenizer.ggml.token_type has {len(kinds)}."
            )
        for token in (i for i, name in enumerate(names) if name in REPLY_TAGS):
            kinds[token] = TokenKind.USER_DEFINED
        merges = [_merge(line) for line in _array(metadata, "merges", str)]
        return cls(names, kinds, merges, _stop_tokens(metadata, names))

    def of_kind(self, kind: TokenKind) -> dict[str, int]:
        """Names and ids of one kind, by id."""
        return {self.names[i]: i for i, k in enumerate(self.kinds) if k == kind}

    def num_real_tokens(self) -> int:
        """One more than the last id that is not padding."""
        real = (i for i in reversed(range(len(self.kinds))) if self.kinds[i] != TokenKind.UNUSED)
        return next(real, -1) + 1

    def ids(self) -> dict[str, int]:
        """Name → id, without the padding.

        Raises:
            ModelFileError: two ids share a name, so that text has no single encoding.
        """
        real = [i for i, kind in enumerate(self.kinds) if kind != TokenKind.UNUSED]
        ids = {self.names[i]: i for i in real}
        if len(ids) != len(real):
            raise ModelFileError(f"{len(real) - len(ids)} tokens of the vocabulary share a name.")
        return ids


def _require(metadata: Mapping[str, Any], key: str, expected: str) -> None:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if found is None:
        raise ModelFileError(f"The file has no tokenizer.ggml.{key}; it holds no vocabulary.")
    if found != expected:
        raise UnsupportedModel(
            f"tokenizer.ggml.{key} is {found!r}; only {expected!r}, Qwen 3.5's, is supported."
        )


def _array(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ModelFileError(f"The file's tokenizer.ggml.{key} is absent or empty.")
    if not all(isinstance(item, kind) for item in values):
        raise ModelFileError(f"The file's tokenizer.ggml.{key} is not a list of {kind.__name__}.")
    return list(values)


def _merge(line: str) -> tuple[str, str]:
    left, space, right = line.partition(" ")
    if not (left and space and right):
        raise ModelFileError(f"{line!r} in tokenizer.ggml.merges is no pair of tokens.")
    return left, right


def _stop_tokens(metadata: Mapping[str, Any], names: Sequence[str]) -> frozenset[int]:
    declared = [metadata.get(f"tokenizer.ggml.{key}") for key in STOP_KEYS]
    stop = {int(token) for token in declared if token is not None}
    if any(not 0 <= token < len(names) for token in stop):
        raise ModelFileError("An end token of the file lies outside its vocabulary.")
    return frozenset(stop | {i for i, name in enumerate(names) if name in STOP_NAMES})
