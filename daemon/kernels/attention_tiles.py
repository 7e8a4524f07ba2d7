"""Prompts cut into tiles of 64 positions, keys into segments, dealt to the blocks of a launch.

Also what the two prefill kernels have in common.

No device needed; any thread.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.kv_format import HEAD_DIM, PAGE_TOKENS, KvLayout
from daemon.kernels.runtime.device_array import ElementType

Int32 = np.ndarray[Any, np.dtype[np.int32]]
OUTPUTS = {ElementType.F32: 0, ElementType.F16: 1}
"""Values of the macro OUTPUT."""

SEGMENT_PAGES = 128
"""Pages whose keys are summed up before they are joined to those before; part of a row's bits."""

PARTIAL_BYTES = 33 * 128 * 16
"""What came of some segments for a tile's head: 64 x 256 outputs, maxima and sums, float32."""

MAX_ITEMS = 512
"""Parts of tiles in a launch where tiles are dealt in parts."""

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
        "SEGMENT_PAGES": SEGMENT_PAGES,
        "PROJECTION_F16": int(projection is ElementType.F16),
        "OUTPUT": OUTPUTS[output],
    }


class QueryItems(NamedTuple):
    """A launch's work, i32 `[n, 8]`: first row, first position, rows, sequence; first segment of
    keys, end, slot, slots. `merges` are the tiles with several segments, in one slot or in one
    each, which the merge kernel joins."""

    items: Int32
    merges: Int32


class TileDealer:
    """Deals tiles to blocks: whole, or in segments where that fills the card better.

    Args:
        blocks_per_tile: head blocks that share a tile's work.
        num_slots: places for what came of segments, each for all heads.
    """

    def __init__(self, blocks_per_tile: int, num_sms: int, num_slots: int) -> None:
        self._blocks = blocks_per_tile
        self._num_sms = num_sms
        self._num_slots = num_slots

    def deal(self, spans: Iterable[tuple[int, int, int, int]]) -> QueryItems:
        """Of spans `(first row, first position, tokens, sequence)`."""
        tiles = query_tiles(spans)
        counts: Int32 = tiles[:, 1] // (PAGE_TOKENS * SEGMENT_PAGES) + 1
        if not self._in_parts(counts):
            slots = np.cumsum(counts > 1, dtype=np.int32) - 1
            lines = _lines(tiles, 0 * counts, counts, slots, 1)
            return QueryItems(lines, lines[counts > 1])
        slots = np.cumsum(counts, dtype=np.int32) - counts
        lines = _lines(tiles, 0 * counts, counts, slots, counts)
        first = np.concatenate([np.arange(count) for count in counts])
        parts = _lines(
            np.repeat(tiles, counts, axis=0),
            first,
            first + 1,
            np.arange(len(first), dtype=np.int32),
        )
        return QueryItems(parts, lines[counts > 1])

    def _in_parts(self, counts: Int32) -> bool:
        """Whole tiles take as many rounds of the card as tiles have segments; parts fill it."""
        total = int(counts.sum())
        if total == len(counts) or total > min(self._num_slots, MAX_ITEMS):
            return False
        whole = -(-len(counts) * self._blocks // self._num_sms) * int(counts.max())
        return -(-total * self._blocks // self._num_sms) < whole


def _lines(tiles: Int32, *columns: Int32 | int) -> Int32:
    lines = np.zeros((len(tiles), 8), np.int32)
    lines[:, :4] = tiles
    for index, column in enumerate(columns, 4):
        lines[:, index] = column
    return lines


def query_tiles(spans: Iterable[tuple[int, int, int, int]]) -> Int32:
    """Cut spans on the grid of 64 positions.

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
