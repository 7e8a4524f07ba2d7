"""The tensor formats of GGUF files: block sizes, and plain de-quantisation to float32.

Owns the table of what is supported. The block layouts themselves are the `gguf` package's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from msgspec import Struct

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

DECODABLE = frozenset(
    "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
)
"""Formats that are promised and tested; a file with any other is refused by name when loaded."""


class QuantFormat(Struct, frozen=True):
    """One ggml tensor type: `block_elements` values lie in `block_bytes` bytes."""

    name: str
    type_id: int
    block_elements: int
    block_bytes: int

    @property
    def decodable(self) -> bool:
        """Whether `dequantize` can read it."""
        return self.name in DECODABLE


QUANT_FORMATS: Mapping[int, QuantFormat] = {
    int(kind): QuantFormat(kind.name, int(kind), *GGML_QUANT_SIZES[kind])
    for kind in GGMLQuantizationType
}


def dequantize(data: Bytes, format: QuantFormat, shape: tuple[int, ...]) -> Float32:
    """Values of a tensor as float32 of `shape`; `data` are its bytes, `[num_bytes]` uint8."""
    assert format.decodable, format.name
    row_bytes = shape[-1] // format.block_elements * format.block_bytes
    if format.name == "F32":
        return data.view(np.float32).reshape(shape)
    blocks = data.reshape(*shape[:-1], row_bytes)
    values: Float32 = quants.dequantize(blocks, GGMLQuantizationType(format.type_id))
    return values.astype(np.float32, copy=False).reshape(shape)
