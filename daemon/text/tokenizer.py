"""Text ⇄ token ids, by the vocabulary and merges of the model's own file.

Owns encoding, decoding and the streaming decoder. Knows nothing of messages or templates.
A Tokenizer is immutable for its users and safe on any thread; an IncrementalDecoder belongs to
one reply.
"""

import codecs
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import tokenizers as rust
from tokenizers import models, normalizers, pre_tokenizers

from daemon.errors import InvalidRequest, ModelFileError
from daemon.text.vocabulary import TokenKind, Vocabulary

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen 3.5 cuts text before merging: digits one by one, marks with their letters."""


def _byte_alphabet() -> dict[str, int]:
    """Character → byte: GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | stand_ins


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Byte-level BPE with NFC, as the model was trained; never adds a token of its own.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        num_real_tokens: ids from here on are padding and must never be sampled.
        control_tokens: text → id of the tokens that steer the model (`<|im_start|>` …).
        stop_tokens: ids that end a reply.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        control = vocabulary.of_kind(TokenKind.CONTROL)
        user_defined = vocabulary.of_kind(TokenKind.USER_DEFINED)
        self.vocab_size = len(vocabulary.names)
        self.num_real_tokens = vocabulary.num_real_tokens()
        self.control_tokens: Mapping[str, int] = MappingProxyType(control)
        self.stop_tokens = vocabulary.stop_tokens
        self._names = vocabulary.names
        self._plain = frozenset(control.values()) | frozenset(user_defined.values())
        self._control = frozenset(control.values())
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        model = _byte_pair_model(vocabulary)
        self._ordinary = _encoder(model, user_defined)
        self._special = _encoder(model, user_defined | control)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build from the `tokenizer.ggml.*` values of a GGUF file (0.7 s for 248,320 tokens).

        Raises:
            ModelFileError: a value is absent or contradicts another.
            UnsupportedModel: another kind of tokenizer.
        """
        tokenizer = cls(Vocabulary.from_metadata(metadata))
        for name in ("<|im_start|>", "<|im_end|>"):
            if name not in tokenizer.control_tokens:
                raise ModelFileError(f"The vocabulary has no control token {name}.")
        return tokenizer

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; without `special`, control tokens in it are ordinary text.

        User-defined tokens (`<think>`, `<tool_call>` …) are matched in either case.

        Raises:
            InvalidRequest: the text has a lone surrogate, which no encoding can express.
        """
        encoder = self._special if special else self._ordinary
        try:
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # how the library refuses a str it cannot read
            raise InvalidRequest("The text holds a lone surrogate; send valid Unicode.") from None
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; they need not be whole characters.

        Raises:
            InvalidRequest: no such token.
        """
        if not 0 <= token < self.vocab_size:
            raise InvalidRequest(f"{token} is not a token of this model.", "tokens")
        known = self._bytes[token]
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, control tokens included; invalid bytes become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of `tokens`, control tokens included."""
        return b"".join(map(self.token_bytes, tokens))

    def is_control(self, token: int) -> bool:
        """Whether the token steers the model, and is no part of a reply's text."""
        return token in self._control

    def decoder(self, *, skip_control: bool = True) -> "IncrementalDecoder":
        """A decoder for one reply; with `skip_control`, control tokens decode to nothing."""
        return IncrementalDecoder(self, skip_control)

    def _spell(self, token: int) -> bytes:
        name = self._names[token]
        if token in self._plain or token >= self.num_real_tokens:
            return name.encode()
        try:
            return bytes(map(BYTE_OF.__getitem__, name))
        except KeyError:
            return name.encode()


class IncrementalDecoder:
    """Tokens → text as they come, never splitting a character.

    The concatenated results equal one decoding of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_control: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that became certain; may be empty."""
        if self._skip_control and self._tokenizer.is_control(token):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def _byte_pair_model(vocabulary: Vocabulary) -> models.BPE:
    ids = vocabulary.ids()
    try:
        return models.BPE(ids, list(vocabulary.merges))
    except Exception as error:  # the library has no narrower class for a merge without a token
        raise ModelFileError(f"The file's merges do not fit its tokens: {error}") from error


def _encoder(model: models.BPE, added: Mapping[str, int]) -> rust.Tokenizer:
    """An encoder over the shared model that cuts `added` out before anything else."""
    encoder = rust.Tokenizer(model)
    encoder.normalizer = normalizers.NFC()
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(rust.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.add_tokens([rust.AddedToken(text, normalized=False) for text in added])
    return encoder
