"""A vocabulary of any size that a tokenizer accepts, with Qwen 3.5's special tokens at its end.

Bytes first, then strings of letters from short to long, each one merge of its beginning and its
last letter; then the special tokens; then padding. 248,320 rows put the special tokens at the ids
of the real vocabulary. The chat template is that of the embedded model.
"""

from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from daemon.engine.weights.gguf import open_gguf

REAL_SIZE = 248_320
NUM_ORDINARY = 248_044
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
    "<think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> "
    "<tts_text_bos_single> <|audio_pad|>"
).split()
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
SPACE = "Ġ"


def vocabulary_metadata(size: int) -> dict[str, Any]:
    """`tokenizer.*` values for an embedding of `size` rows.

    A `size` below 289 leaves no room for the bytes and the special tokens.
    """
    num_ordinary = min(size - len(SPECIAL), NUM_ORDINARY)
    assert num_ordinary >= 256, f"{size} rows are too few for a vocabulary"
    merged = list(islice(_merges(), num_ordinary - 256))
    names = [*_byte_names(), *(left + right for left, right in merged), *SPECIAL]
    kinds = [1] * num_ordinary
    kinds += [CONTROL if name.startswith("<|") else USER_DEFINED for name in SPECIAL]
    padding = range(len(names), size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": names + [f"[PAD{i}]" for i in padding],
        "tokenizer.ggml.token_type": np.asarray(kinds + [UNUSED] * len(padding), np.int32),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merged],
        "tokenizer.ggml.eos_token_id": num_ordinary + SPECIAL.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": num_ordinary,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _embedded_template(),
    }


def _byte_names() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def _merges() -> Iterator[tuple[str, str]]:
    """Every string of letters once, shorter ones first, with or without a space before it."""
    shorter = [SPACE, *LETTERS]
    while True:
        pairs = [(left, right) for left in shorter for right in LETTERS]
        yield from pairs
        shorter = [left + right for left, right in pairs]


def _embedded_template() -> str:
    embedded = Path(str(files("daemon.embedded").joinpath("tiny-coder-Q4_K_M.gguf")))
    return str(open_gguf(embedded).metadata["tokenizer.chat_template"])
