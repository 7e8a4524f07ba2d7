"""Formats of cached keys and values, and where they lie in a page; the twin of `kv_format.cuh`.

Owns the layout's arithmetic: `[pages][layers][K plane | V plane]`, a plane `[kv_heads][block]`.
Refuses to know who owns a page. No device needed; any thread.
"""

from enum import Enum
from typing import NamedTuple

PAGE_TOKENS = 64
HEAD_DIM = 256


class KvFormat(Enum):
    """A format's number in the kernels, and bytes of one head of one page."""

    BF16 = (0, 512 * PAGE_TOKENS)
    Q8_0 = (1, 272 * PAGE_TOKENS)
    FP8 = (2, 256 * PAGE_TOKENS)
    Q4_0 = (3, 144 * PAGE_TOKENS)

    @property
    def code(self) -> int:
        """Value of the kernels' K_FORMAT and V_FORMAT."""
        return self.value[0]

    @property
    def block_bytes(self) -> int:
        """64 tokens x 256 dims, scales included."""
        return self.value[1]


class KvLayout(NamedTuple):
    """Pages of all attention layers: one page of all layers is one contiguous run of bytes."""

    num_layers: int
    kv_heads: int
    k_format: KvFormat
    v_format: KvFormat

    @property
    def layer_bytes(self) -> int:
        """Keys and values of one layer in one page."""
        return self.kv_heads * (self.k_format.block_bytes + self.v_format.block_bytes)

    @property
    def page_bytes(self) -> int:
        """One page, all layers."""
        return self.num_layers * self.layer_bytes

    def layer_offset(self, layer: int) -> int:
        """Bytes from a page's start to the layer's K plane."""
        return layer * self.layer_bytes

    @property
    def queries_are_bf16(self) -> bool:
        """Queries are bf16 next to bf16 keys and f16 otherwise."""
        return self.k_format is KvFormat.BF16

    @property
    def defines(self) -> dict[str, str | int]:
        """Preprocessor macros that every kernel over pages takes."""
        return {"K_FORMAT": self.k_format.code, "V_FORMAT": self.v_format.code}
