"""Prompts cut into tiles of 64 positions, and what the two prefill kernels have in common.

No device needed; any thread.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.kv_format import HEAD_DIM, PAGE_TOKENS, KvLayout
from daemon.kernels.runtime.device_array import ElementType

OUTPUTS = {ElementType.F32: 0, ElementType.F16: 1}
"""Values of the macro OUTPUT."""

TILE_BYTES = PAGE_TOKENS * HEAD_DIM * 2
"""A tile of queries, keys or values in shared memory, 16 bits a value."""


class PrefillVariant(NamedTuple):
    """One of the kernels, compiled for one layout: what a launch needs to know of it."""

    source: Path
    defines: dict[str, str | int]
    heads: int
    threads: int
    shared_bytes: int


def variant_defines(
    layout: KvLayout, group: int, projection: ElementType, output: ElementType
) -> dict[str, str | int]:
    """Macros that both kernels take; outputs of F16 are chunks of an operand."""
    return {
        **layout.defines,
        "GROUP": group,
        "PROJECTION_F16": int(projection is ElementType.F16),
        "OUTPUT": OUTPUTS[output],
    }


def query_tiles(spans: Iterable[tuple[int, int, int, int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Cut spans `(first row, first position, tokens, sequence)` on the grid of 64 positions.

    Gives i32 `[tiles, 4]` of the same four numbers, by position, since the kernels begin with the
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
