"""Launches quant_gemv: up to 16 rows times a packed matrix, weights read once at memory speed.

Owns how the units of a matrix are dealt to teams of four warps. That depends on the matrix and the
card only, never on the number of tokens, so that sums keep their order. The device's thread.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.quant_pack import (
    BLOCK_COLUMNS,
    STRIPE_ROWS,
    PackedMatrix,
    QuantType,
    Segment,
    types_and_tile,
)
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Kernel, Module
from daemon.kernels.weight_ring import STATIC_SHARED_BYTES, most_warps, ring_defines

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 5 + ("int32",) * 4
MAX_RING_BYTES = 144 * 1024
LISTS_BYTES = 8 * 1024
"""Room for what a block is dealt."""

MAX_TOKENS = 16
PANEL_TOKENS = 8
TEAM_WARPS = 4
AWAITED_BYTE = 0xFF
"""Four of them are a sum that no block has written yet."""

STORE, ADD, SWIGLU = 0, 1, 2
"""What happens to the sums; SWIGLU needs a paired matrix and gives panels for the next product."""

_INTS = "type tile_bytes first_block num_units row num_rows sums unused"
PIECE = np.dtype([("units", np.uint64), *((name, np.int32) for name in _INTS.split())])
"""struct Piece of quant_gemv.cu."""

_INTS = "first_sums num_sums row num_rows first_slot num_before own_slot type"
SEAM = np.dtype([(name, np.int32) for name in _INTS.split()])
"""struct Seam of quant_gemv.cu."""

Table = np.ndarray[Any, np.dtype[Any]]


SPACING = 2**40
"""Between segments whose addresses do not matter yet."""


class Stripe(NamedTuple):
    """64 rows of a matrix, 32 of F32: where their units lie, and what one weighs."""

    pointer: int
    kind: int
    tile_bytes: int
    row: int
    num_rows: int


class Plan(NamedTuple):
    """Who does what for one matrix: `deals` u8 `[blocks, bytes of their lists]` on the device."""

    matrix: PackedMatrix
    deals: DeviceArray
    max_pieces: int


class GemvShape(NamedTuple):
    """How a launch fills the card; `ring_bytes` of a block are in flight."""

    warps: int
    blocks_per_sm: int
    ring_bytes: int

    @property
    def teams(self) -> int:
        """Teams of a block."""
        return self.warps // TEAM_WARPS


def choose_shape(shared_bytes_per_block: int) -> GemvShape:
    """As many teams a multiprocessor as its shared memory keeps rings for."""
    warps = most_warps(shared_bytes_per_block)
    sums = _sums_bytes(warps // TEAM_WARPS, MAX_TOKENS)
    room = shared_bytes_per_block - STATIC_SHARED_BYTES - LISTS_BYTES - sums
    return GemvShape(warps, 1, min(MAX_RING_BYTES, room))


class GemvKernels:
    """Plans and launches; kernels are compiled when first used."""

    def __init__(self, device: Device, compiler: Compiler, shape: GemvShape | None = None) -> None:
        self._device = device
        self._compiler = compiler
        self._shape = shape or choose_shape(device.shared_bytes_per_block)
        self._num_blocks = device.num_sms * self._shape.blocks_per_sm
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def plan(self, matrix: PackedMatrix) -> Plan:
        """Deal a matrix to the blocks, once, when the model is loaded."""
        dealt = deal(matrix, self._num_blocks, self._shape.teams)
        assert dealt.num_slots <= self._partial.shape[0]
        return Plan(matrix, self._device.to_device(dealt.bytes()), dealt.pieces.shape[2])

    def multiply(
        self,
        plan: Plan,
        panels: DeviceArray,
        num_tokens: int,
        out: DeviceArray,
        epilogue: int,
    ) -> None:
        """Multiply `num_tokens` (1 to 16) rows.

        Args:
            panels: the rows as fp16 panels (quant_activations), or an earlier SWIGLU's output.
            out: float32 `[num_tokens, rows]` for STORE and ADD; panels for SWIGLU.
        """
        assert 0 < num_tokens <= MAX_TOKENS
        num_panels = -(-num_tokens // PANEL_TOKENS)
        matrix = plan.matrix
        shape = self._shape
        types, slot_bytes = types_and_tile(segment.kind for segment in matrix.segments)
        slots = max(1, shape.ring_bytes // (shape.warps * slot_bytes))
        kernel = self._kernel((types, num_panels, slots, slot_bytes), epilogue)
        stride = matrix.rows // 2 if epilogue == SWIGLU else matrix.rows
        rows, out_panels = (0, out) if epilogue == SWIGLU else (out, 0)
        assert matrix.paired == (epilogue == SWIGLU)
        assert out.num_bytes >= num_tokens * stride * (2 if epilogue == SWIGLU else 4)
        kernel.launch(
            self._device.stream,
            (self._num_blocks, 1, 1),
            (32 * shape.warps, 1, 1),
            *(plan.deals, panels, rows, out_panels, self._partial, plan.max_pieces),
            *(matrix.columns // BLOCK_COLUMNS, num_tokens, stride),
            shared_bytes=shared_bytes(shape, slots, slot_bytes, num_panels, plan.max_pieces),
            dependent=True,
        )

    @cached_property
    def _partial(self) -> DeviceArray:
        """Sums on their way between blocks, one of each block.

        All products share them: each takes what it leaves, and waits for the one before.
        """
        partial = self._device.allocate((self._num_blocks, MAX_TOKENS, STRIPE_ROWS), np.float32)
        self._device.fill(partial, AWAITED_BYTE)
        return partial

    def _kernel(self, variant: tuple[int, int, int, int], epilogue: int) -> Kernel:
        key = (*variant, epilogue)
        if key not in self._kernels:
            macros = defines(self._shape, *variant, epilogue, self._compiler.arch)
            cubin = self._compiler.cubin(SOURCE, macros)
            most = self._device.shared_bytes_per_block - STATIC_SHARED_BYTES
            self._kernels[key] = Module(cubin).kernel("quant_gemv", PARAMETERS, most)
        return self._kernels[key]


def defines(
    shape: GemvShape,
    types: int,
    num_panels: int,
    slots: int,
    slot_bytes: int,
    epilogue: int,
    arch: str,
) -> dict[str, int]:
    """The macros of a variant."""
    return {
        "WARPS": shape.warps,
        "BLOCKS_PER_SM": shape.blocks_per_sm,
        "TYPES": types,
        "NUM_PANELS": num_panels,
        "EPILOGUE": epilogue,
        **ring_defines(slots, slot_bytes, arch),
    }


def shared_bytes(
    shape: GemvShape, slots: int, slot_bytes: int, num_panels: int, max_pieces: int
) -> int:
    """Rings of all warps, sums of two pieces of each team, and what the block is dealt."""
    sums = _sums_bytes(shape.teams, num_panels * PANEL_TOKENS)
    lists = shape.teams * max_pieces * PIECE.itemsize + _max_seams(shape.teams) * SEAM.itemsize
    return shape.warps * slots * slot_bytes + sums + lists


def _sums_bytes(teams: int, tokens: int) -> int:
    """Of two pieces of each team."""
    return 2 * teams * tokens * STRIPE_ROWS * 4


class Dealt(NamedTuple):
    """Lists of all blocks, ended by empty rows, and how many slots their seams use.

    `pieces` (PIECE) `[blocks, teams, most + 1]`, `seams` (SEAM) `[blocks, teams + 2]`.
    """

    pieces: Table
    seams: Table
    num_slots: int

    def bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Each block's pieces, then its seams."""
        parts = (self.pieces, self.seams)
        return np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in parts], 1)


class _Run(NamedTuple):
    """Units `first` to `first + num_units` of stripe `stripe`, for team `team` of block `block`."""

    block: int
    team: int
    stripe: int
    first: int
    num_units: int


def deal(matrix: PackedMatrix, num_blocks: int, num_teams: int) -> Dealt:
    """Cut the units of all stripes, in order, into shares of equal bytes for blocks and teams.

    Matrices of one shape are dealt alike, so that a model's few shapes are worked out once each.
    """
    shapes = tuple((kind, row, rows, tiles.shape) for kind, row, rows, tiles in matrix.segments)
    dealt = _deal_shape(shapes, matrix.columns, num_blocks, num_teams)
    pieces = dealt.pieces.copy()
    number, offset = np.divmod(pieces["units"], np.uint64(SPACING))
    bases = np.array([segment.tiles.pointer for segment in matrix.segments], np.uint64)
    pieces["units"] = np.where(pieces["num_units"] > 0, bases[number] + offset, 0)
    return dealt._replace(pieces=pieces)


@lru_cache(maxsize=256)
def _deal_shape(
    shapes: tuple[tuple[QuantType, int, int, tuple[int, ...]], ...],
    columns: int,
    num_blocks: int,
    num_teams: int,
) -> Dealt:
    """As if the segments' tiles lay SPACING apart, from address 0 on."""
    segments = tuple(
        Segment(kind, row, rows, DeviceArray(number * SPACING, shape, ElementType.U8, None))
        for number, (kind, row, rows, shape) in enumerate(shapes)
    )
    matrix = PackedMatrix(0, columns, segments, paired=False)
    stripes = stripes_of(matrix)
    units = matrix.columns // BLOCK_COLUMNS
    ends = np.cumsum(np.repeat([stripe.tile_bytes for stripe in stripes], units))
    runs: list[_Run] = []
    for block, (first, last) in enumerate(pairwise(_cuts(ends, 0, len(ends), num_blocks))):
        for team, (start, stop) in enumerate(pairwise(_cuts(ends, first, last, num_teams))):
            while start < stop:
                stripe, offset = divmod(start, units)
                count = min(units - offset, stop - start)
                runs.append(_Run(block, team, stripe, offset, count))
                start += count
    counts = np.zeros((num_blocks, num_teams), np.int32)
    for run in runs:
        counts[run.block, run.team] += 1
    pieces = np.zeros((num_blocks, num_teams, counts.max() + 1), PIECE)
    _fill_pieces(pieces, runs, stripes, units)
    seams = np.zeros((num_blocks, _max_seams(num_teams)), SEAM)
    return Dealt(pieces, seams, _fill_seams(seams, runs, stripes, units))


def _cuts(ends: np.ndarray[Any, Any], first: int, last: int, num_shares: int) -> list[int]:
    """Bounds of `num_shares` runs of equal bytes of units `[first, last)`; `ends` adds bytes up."""
    before = int(ends[first - 1]) if first else 0
    after = int(ends[last - 1]) if last else 0
    marks = before + np.arange(1, num_shares) * ((after - before) / num_shares)
    inner = np.searchsorted(ends, marks, side="right").clip(first, last)
    return [first, *inner.tolist(), last]


def _max_seams(num_teams: int) -> int:
    return num_teams + 2


def _fill_pieces(pieces: Table, runs: list[_Run], stripes: list[Stripe], units: int) -> None:
    counts: Counter[tuple[int, int]] = Counter()
    cut: Counter[int] = Counter()
    for run in runs:
        place, stripe = (run.block, run.team), stripes[run.stripe]
        sums = -1 if run.num_units == units else cut[run.block]
        cut[run.block] += run.num_units < units
        pointer = stripe.pointer + run.first * TEAM_WARPS * stripe.tile_bytes
        shape = (
            stripe.kind,
            stripe.tile_bytes,
            run.first,
            run.num_units,
            stripe.row,
            stripe.num_rows,
        )
        pieces[run.block, run.team, counts[place]] = (pointer, *shape, sums, 0)
        counts[place] += 1


def _fill_seams(seams: Table, runs: list[_Run], stripes: list[Stripe], units: int) -> int:
    """Returns how many slots are used."""
    slot = 0
    counts: Counter[int] = Counter()
    cut: Counter[int] = Counter()
    for index, group in groupby((run for run in runs if run.num_units < units), lambda r: r.stripe):
        shares = Counter(run.block for run in group)
        first_slot, last = slot, max(shares)
        for number, (block, num_sums) in enumerate(sorted(shares.items())):
            own = -1 if block == last else first_slot + number
            stripe = stripes[index]
            where = (stripe.row, stripe.num_rows, first_slot, number, own, stripe.kind)
            seams[block, counts[block]] = (cut[block], num_sums, *where)
            counts[block] += 1
            cut[block] += num_sums
        slot += len(shares) - 1
    return slot


def stripes_of(matrix: PackedMatrix) -> list[Stripe]:
    """All stripes in the order of their rows."""
    stripes = []
    for kind, first_row, rows, tiles in matrix.segments:
        stripe_bytes = tiles.num_bytes // tiles.shape[0]
        for index in range(tiles.shape[0]):
            row = index * kind.stripe_rows
            valid = min(kind.stripe_rows, rows - row)
            pointer = tiles.pointer + index * stripe_bytes
            stripes.append(Stripe(pointer, kind.code, kind.tile_bytes, first_row + row, valid))
    return stripes
