"""Launches quant_gemv: up to 16 rows times a packed matrix, weights read once at memory speed.

Owns how the units of a matrix are dealt to teams of four warps. That depends on the matrix and the
card only, never on the number of tokens, so that sums keep their order. The device's thread.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.quant_pack import BLOCK_COLUMNS, STRIPE_ROWS, PackedMatrix
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Kernel, Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 7 + ("int32",) * 6
ROOMY_SHARED_BYTES = 160 * 1024
"""Cards with more have four teams a multiprocessor, others two."""

MAX_TOKENS = 16
PANEL_TOKENS = 8
TEAM_WARPS = 4
STATIC_SHARED_BYTES = 3072
"""Barriers, and what the driver keeps of a block."""

WITHOUT_COPY_ENGINE = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
"""Plain sm_90 leaves Hopper's own instructions out: tests run the portable code with it."""

STORE, ADD, SWIGLU = 0, 1, 2
"""What happens to the sums; SWIGLU needs a paired matrix and gives panels for the next product."""

PIECE = np.dtype(
    [
        ("units", np.uint64),
        ("kind", np.int32),
        ("tile_bytes", np.int32),
        ("first_block", np.int32),
        ("num_units", np.int32),
        ("row", np.int32),
        ("num_rows", np.int32),
        ("slot", np.int32),
        ("first_slot", np.int32),
        ("num_slots", np.int32),
        ("counter", np.int32),
    ],
    align=True,
)
"""struct Piece of quant_gemv.cu."""


Table = np.ndarray[Any, np.dtype[Any]]


class Stripe(NamedTuple):
    """64 rows of a matrix: where their units lie, and what one weighs."""

    pointer: int
    kind: int
    tile_bytes: int
    row: int
    num_rows: int


class Plan(NamedTuple):
    """Who does what for one matrix, on the device: `pieces` is PIECE bytes `[teams, most + 1]`."""

    matrix: PackedMatrix
    pieces: DeviceArray
    max_pieces: int
    partial: DeviceArray
    counters: DeviceArray


class GemvShape(NamedTuple):
    """How a launch fills the card.

    `ring_bytes` of a block are in flight; `prefetch_bytes` of each team's share of the next
    matrix are brought into the L2 cache.
    """

    warps: int
    blocks_per_sm: int
    ring_bytes: int
    prefetch_bytes: int

    @property
    def teams(self) -> int:
        """Teams of a block."""
        return self.warps // TEAM_WARPS


def choose_shape(shared_bytes_per_block: int) -> GemvShape:
    """Four teams a multiprocessor where its shared memory keeps a ring for each."""
    if shared_bytes_per_block > ROOMY_SHARED_BYTES:
        return GemvShape(16, 1, 160 * 1024, 40 * 1024)
    return GemvShape(8, 1, shared_bytes_per_block - STATIC_SHARED_BYTES - 8 * 1024, 0)


class GemvKernels:
    """Plans and launches; kernels are compiled when first used."""

    def __init__(self, device: Device, compiler: Compiler, shape: GemvShape | None = None) -> None:
        self._device = device
        self._compiler = compiler
        self._shape = shape or choose_shape(device.shared_bytes_per_block)
        self._num_blocks = device.num_sms * self._shape.blocks_per_sm
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def plan(self, matrix: PackedMatrix) -> Plan:
        """Deal a matrix to the teams, once, when the model is loaded."""
        dealt = deal(matrix, self._num_blocks * self._shape.teams)
        counters = self._device.allocate((max(dealt.num_cut, 1), TEAM_WARPS), np.int32)
        self._device.fill(counters, 0)
        partial = (max(dealt.num_slots, 1), MAX_TOKENS, STRIPE_ROWS)
        return Plan(
            matrix,
            self._device.to_device(dealt.pieces.view(np.uint8).reshape(len(dealt.pieces), -1)),
            dealt.pieces.shape[1],
            self._device.allocate(partial, np.float32),
            counters,
        )

    def multiply(
        self,
        plan: Plan,
        panels: DeviceArray,
        num_tokens: int,
        out: DeviceArray,
        epilogue: int,
        upcoming: Plan | None = None,
    ) -> None:
        """Multiply `num_tokens` (1 to 16) rows.

        Args:
            panels: the rows as fp16 panels (quant_activations), or an earlier SWIGLU's output.
            out: float32 `[num_tokens, rows]` for STORE and ADD; panels for SWIGLU.
            upcoming: what the next launch will multiply by, if that is known.
        """
        assert 0 < num_tokens <= MAX_TOKENS
        num_panels = -(-num_tokens // PANEL_TOKENS)
        matrix = plan.matrix
        shape, (types, slot_bytes) = self._shape, _types_and_slot(matrix)
        slots = max(1, shape.ring_bytes // (shape.warps * slot_bytes))
        kernel = self._kernel((types, num_panels, slots, slot_bytes), epilogue)
        stride = matrix.rows // 2 if epilogue == SWIGLU else matrix.rows
        rows, out_panels = (0, out) if epilogue == SWIGLU else (out, 0)
        assert matrix.paired == (epilogue == SWIGLU)
        assert out.num_bytes >= num_tokens * stride * (2 if epilogue == SWIGLU else 4)
        tables = (plan.pieces, upcoming.pieces if upcoming else 0)
        lengths = (plan.max_pieces, upcoming.max_pieces if upcoming else 0)
        kernel.launch(
            self._device.stream,
            (self._num_blocks, 1, 1),
            (32 * shape.warps, 1, 1),
            *(*tables, panels, rows, out_panels, plan.partial, plan.counters),
            *(*lengths, shape.prefetch_bytes),
            *(matrix.columns // BLOCK_COLUMNS, num_tokens, stride),
            shared_bytes=shared_bytes(shape, slots, slot_bytes, plan.max_pieces),
            dependent=True,
        )

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
        "SLOTS": slots,
        "SLOT_BYTES": slot_bytes,
        "EPILOGUE": epilogue,
        "BULK_COPIES": int(arch not in WITHOUT_COPY_ENGINE),
    }


def shared_bytes(shape: GemvShape, slots: int, slot_bytes: int, max_pieces: int) -> int:
    """Rings of all warps, and the lists of pieces of all teams."""
    return shape.warps * slots * slot_bytes + shape.teams * max_pieces * PIECE.itemsize


def _types_and_slot(matrix: PackedMatrix) -> tuple[int, int]:
    kinds = {segment.kind for segment in matrix.segments}
    types = sum(1 << kind.code for kind in kinds)
    return types, max(kind.tile_bytes for kind in kinds)


class Dealt(NamedTuple):
    """`pieces` (PIECE) `[teams, most of a team + 1]`, ended by empty ones; slots, cut stripes."""

    pieces: Table
    num_slots: int
    num_cut: int


def deal(matrix: PackedMatrix, num_teams: int) -> Dealt:
    """Cut the units of all stripes, in order, into runs of equal bytes, one a team."""
    stripes = stripes_of(matrix)
    units = matrix.columns // BLOCK_COLUMNS
    weights = np.repeat([stripe.tile_bytes for stripe in stripes], units)
    ends = np.cumsum(weights)
    cuts = np.searchsorted(ends, np.arange(1, num_teams) * (ends[-1] / num_teams), side="right")
    pieces: list[list[int]] = []
    counts = []
    for start, stop in pairwise([0, *cuts.tolist(), len(weights)]):
        before = len(pieces)
        while start < stop:
            index, first = divmod(start, units)
            count = min(units - first, stop - start)
            pieces.append([index, first, count])
            start += count
        counts.append(len(pieces) - before)
    table, num_slots, num_cut = _piece_table(pieces, stripes)
    by_team = np.zeros((num_teams, max(counts) + 1), PIECE)
    for team, rows in enumerate(np.split(table, np.cumsum(counts)[:-1])):
        by_team[team, : len(rows)] = rows
    return Dealt(by_team, num_slots, num_cut)


def stripes_of(matrix: PackedMatrix) -> list[Stripe]:
    """All stripes in the order of their rows."""
    stripes = []
    for kind, first_row, rows, tiles in matrix.segments:
        stripe_bytes = tiles.num_bytes // tiles.shape[0]
        for index in range(tiles.shape[0]):
            row = index * STRIPE_ROWS
            valid = min(STRIPE_ROWS, rows - row)
            pointer = tiles.pointer + index * stripe_bytes
            stripes.append(Stripe(pointer, kind.code, kind.tile_bytes, first_row + row, valid))
    return stripes


def _piece_table(pieces: list[list[int]], stripes: list[Stripe]) -> tuple[Table, int, int]:
    table = np.zeros(len(pieces), PIECE)
    shares = np.bincount([index for index, _, _ in pieces], minlength=len(stripes))
    slot = first_slot = counter = 0
    for number, (index, first, count) in enumerate(pieces):
        stripe, share = stripes[index], int(shares[index])
        whole = share == 1
        units = stripe.pointer + first * 4 * stripe.tile_bytes
        if first == 0 and not whole:
            first_slot, counter = slot, counter + 1
        slots = (-1, 0, 1, 0) if whole else (slot, first_slot, share, counter - 1)
        slot += not whole
        shape = (stripe.kind, stripe.tile_bytes, first, count, stripe.row, stripe.num_rows)
        table[number] = (units, *shape, *slots)
    return table, slot, counter
