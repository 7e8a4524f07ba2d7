"""Launches `attention_prefill.cu`: spans of prompts attend to their pages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from daemon.kernels.kv_format import HEAD_DIM, PAGE_TOKENS, KvLayout
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 6 + ("int32",) * 3 + ("int64",) * 2
TILE_BYTES = PAGE_TOKENS * HEAD_DIM * 2


def query_tiles(spans: Iterable[tuple[int, int, int, int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Cut spans `(first row, first position, tokens, sequence)` on the grid of 64 positions.

    Gives i32 `[tiles, 4]` of the same four numbers, by position, since the kernel begins with the
    last ones, which have most keys.
    """
    tiles = []
    for row, position, count, sequence in spans:
        end = position + count
        while position < end:
            size = min(end, (position // PAGE_TOKENS + 1) * PAGE_TOKENS) - position
            tiles.append((row, position, size, sequence))
            row, position = row + size, position + size
    return np.array(sorted(tiles, key=lambda tile: tile[1]), np.int32).reshape(-1, 4)


def heads_per_block(group: int, shared_bytes_per_block: int) -> int:
    """Two query heads share a page in shared memory where they fit."""
    return 2 if group % 2 == 0 and shared_bytes_per_block >= 4 * TILE_BYTES else 1


def defines(
    layout: KvLayout, group: int, heads: int, projection: ElementType, output: ElementType
) -> dict[str, str | int]:
    """Macros of one variant."""
    return {
        **layout.defines,
        "GROUP": group,
        "HEADS": heads,
        "PROJECTION_BF16": int(projection is ElementType.BF16),
        "OUTPUT_BF16": int(output is ElementType.BF16),
    }


class AttentionPrefill:
    """The kernel for one layout of pages."""

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        layout: KvLayout,
        q_heads: int,
        projection: ElementType,
        output: ElementType,
    ) -> None:
        group, rest = divmod(q_heads, layout.kv_heads)
        assert rest == 0
        self._heads = heads_per_block(group, device.shared_bytes_per_block)
        self._shared_bytes = (self._heads + 2) * TILE_BYTES
        cubin = compiler.cubin(SOURCE, defines(layout, group, self._heads, projection, output))
        module = Module(cubin)
        self._kernel = module.kernel("attention_prefill", PARAMETERS, self._shared_bytes)
        self._stream = device.stream
        self._layout = layout
        self._blocks = q_heads // self._heads

    def __call__(
        self,
        queries: DeviceArray,
        projections: DeviceArray,
        tiles: DeviceArray,
        page_table: DeviceArray,
        pool: DeviceArray,
        layer: int,
        output: DeviceArray,
        dependent: bool = False,
    ) -> None:
        """Gated causal attention of every row of `tiles`, after their keys were appended.

        Args:
            queries: 16-bit `[rows, q_heads, 256]` from `KvAppend`.
            projections: the rows that `KvAppend` read; gates are taken from them.
            tiles: i32 `[tiles, 4]` from `query_tiles`; lines without rows may follow.
            output: `[rows, q_heads, 256]`; rows of no tile are left as they are.
        """
        self._kernel.launch(
            self._stream,
            (tiles.shape[0], self._blocks, 1),
            (self._heads * 128, 1, 1),
            queries,
            projections,
            tiles,
            page_table,
            pool,
            output,
            projections.shape[1],
            page_table.shape[1],
            self._layout.kv_heads,
            self._layout.page_bytes,
            self._layout.layer_offset(layer),
            shared_bytes=self._shared_bytes,
            dependent=dependent,
        )
