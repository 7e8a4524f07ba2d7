"""Formats that no kernel reads, as Q8_0: value for value where its scales allow that, else rounded.

Block layouts: ggml-common.h. Host code, some rows at a time, on the threads that read the file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK_VALUES = 32
AT_ONCE = 2**18
"""Values that are taken apart at a time: they should stay in the processor's cache."""

IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
MXFP4_BIAS = 128
"""Of exponents, the values being doubled."""

MAX_EXPONENT = MXFP4_BIAS + 15
"""Of a power of two in fp16."""


def as_q8_0(format_name: str, rows: int, data: Bytes) -> Bytes:
    """The bytes of `rows` rows in a format of CONVERTED as Q8_0."""
    row_bytes = len(data) // rows
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format_name]]
    columns = row_bytes // block_bytes * block_values
    converted = np.empty((rows, columns // BLOCK_VALUES * 34), np.uint8)
    step = max(1, AT_ONCE // columns)
    for start in range(0, rows, step):
        part = data[start * row_bytes : (start + step) * row_bytes]
        blocks = CONVERTED[format_name](format_name, part)
        converted[start : start + step] = blocks.reshape(-1, converted.shape[1])
    return converted.reshape(-1)


def _rounded(format_name: str, data: Bytes) -> Bytes:
    from gguf import GGMLQuantizationType, quants

    # One long row: the package goes through many short ones a few at a time.
    values = quants.dequantize(data.reshape(1, -1), GGMLQuantizationType[format_name])
    return quants.quantize(values, GGMLQuantizationType.Q8_0)


def _from_q5_0(format_name: str, data: Bytes) -> Bytes:
    """fp16 scale, 32 fifth bits, 32 nibbles; a value is scale * (code - 16)."""
    blocks = data.reshape(-1, 22)
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << np.uint8(4)
    codes = _nibbles(blocks[:, 6:]) + fifth - np.uint8(16)
    return _joined(blocks[:, :2], codes)


def _from_iq4_nl(format_name: str, data: Bytes) -> Bytes:
    """fp16 scale, 32 nibbles; a value is scale * IQ4_NL_VALUES[code]."""
    blocks = data.reshape(-1, 18)
    codes = IQ4_NL_VALUES.view(np.uint8)[_nibbles(blocks[:, 2:])]
    return _joined(blocks[:, :2], codes)


def _from_mxfp4(format_name: str, data: Bytes) -> Bytes:
    """An exponent, 32 nibbles; a value is 2^(exponent - 128) * MXFP4_VALUES[code]."""
    blocks = data.reshape(-1, 17)
    exponents = blocks[:, :1].astype(np.int32)
    if exponents.max() > MAX_EXPONENT:
        return _rounded(format_name, data)
    scales = np.ldexp(np.float32(1), exponents - MXFP4_BIAS).astype(np.float16)
    codes = MXFP4_VALUES.view(np.uint8)[_nibbles(blocks[:, 1:])]
    return _joined(scales.view(np.uint8).reshape(-1, 2), codes)


def _nibbles(packed: Bytes) -> Bytes:
    """The low ones of all 16 bytes, then the high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _joined(scales: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([scales, codes], axis=1)


CONVERTED: Mapping[str, Callable[[str, Bytes], Bytes]] = {
    "Q4_1": _rounded,
    "Q5_1": _rounded,
    "Q2_K": _rounded,
    "Q3_K": _rounded,
    "Q5_0": _from_q5_0,
    "IQ4_NL": _from_iq4_nl,
    "MXFP4": _from_mxfp4,
}
"""What is converted when loaded, and how."""

ROUNDED = frozenset(name for name, convert in CONVERTED.items() if convert is _rounded)
"""Those whose values may change, by half a step of Q8_0 at most."""
