"""Launches quant_gemv: up to 16 rows times a packed matrix, weights read once at memory speed.

Owns how the units of a matrix are dealt to the blocks. That depends on the matrix and the card
only, never on the number of tokens, so that sums keep their order. The device's thread.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.quant_pack import BLOCK_COLUMNS, STRIPE_ROWS, PackedMatrix
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Kernel, Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 7 + ("int32",) * 4
ROOMY_SHARED_BYTES = 160 * 1024
"""Cards with more take 16 warps a block, others 8, so that each warp's ring has several slots."""

MAX_TOKENS = 16
PANEL_TOKENS = 8
RING_BYTES = 160 * 1024
"""In flight per block. More than half of a multiprocessor's shared memory: one block each. Were two
to fit, the next kernel's early blocks would gather on some multiprocessors and miss on others."""

STATIC_SHARED_BYTES = 2048
"""Barriers and a flag."""

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
    """Who does what for one matrix, on the device."""

    matrix: PackedMatrix
    pieces: DeviceArray
    num_pieces: DeviceArray
    partial: DeviceArray
    counters: DeviceArray
    num_blocks: int


class GemvKernels:
    """Plans and launches; kernels are compiled when first used."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self._device = device
        self._compiler = compiler
        self._warps = 16 if device.shared_bytes_per_block > ROOMY_SHARED_BYTES else 8
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def plan(self, matrix: PackedMatrix) -> Plan:
        """Deal a matrix to the blocks, once, when the model is loaded."""
        num_blocks = self._device.num_sms
        pieces, num_pieces, num_slots, num_counters = deal(matrix, num_blocks)
        counters = self._device.allocate((max(num_counters, 1),), np.int32)
        self._device.fill(counters, 0)
        partial = (max(num_slots, 1), MAX_TOKENS, STRIPE_ROWS)
        return Plan(
            matrix,
            self._device.to_device(pieces.view(np.uint8).reshape(num_blocks, -1)),
            self._device.to_device(num_pieces),
            self._device.allocate(partial, np.float32),
            counters,
            num_blocks,
        )

    def multiply(
        self, plan: Plan, panels: DeviceArray, num_tokens: int, out: DeviceArray, epilogue: int
    ) -> None:
        """Multiply `num_tokens` (1 to 16) rows.

        Args:
            panels: the rows as fp16 panels (quant_activations), or an earlier SWIGLU's output.
            out: float32 `[num_tokens, rows]` for STORE and ADD; panels for SWIGLU.
        """
        assert 0 < num_tokens <= MAX_TOKENS
        num_panels = -(-num_tokens // PANEL_TOKENS)
        matrix = plan.matrix
        types, slot_bytes = _types_and_slot(matrix)
        slots = self._slots(slot_bytes, num_panels)
        kernel = self._kernel((types, num_panels, slots, slot_bytes), epilogue)
        stride = matrix.rows // 2 if epilogue == SWIGLU else matrix.rows
        max_pieces = plan.pieces.shape[1] // PIECE.itemsize
        rows, out_panels = (0, out) if epilogue == SWIGLU else (out, 0)
        assert matrix.paired == (epilogue == SWIGLU)
        assert out.num_bytes >= num_tokens * stride * (2 if epilogue == SWIGLU else 4)
        kernel.launch(
            self._device.stream,
            (plan.num_blocks, 1, 1),
            (32 * self._warps, 1, 1),
            *(plan.pieces, plan.num_pieces, panels, rows, out_panels, plan.partial, plan.counters),
            *(max_pieces, matrix.columns // BLOCK_COLUMNS, num_tokens, stride),
            shared_bytes=shared_bytes(self._warps, slots, slot_bytes, num_panels),
            dependent=True,
        )

    def _slots(self, slot_bytes: int, num_panels: int) -> int:
        limit = self._device.shared_bytes_per_block - STATIC_SHARED_BYTES
        room = limit - shared_bytes(self._warps, 0, 0, num_panels)
        return max(1, min(RING_BYTES, room) // (self._warps * slot_bytes))

    def _kernel(self, variant: tuple[int, int, int, int], epilogue: int) -> Kernel:
        key = (*variant, epilogue)
        if key not in self._kernels:
            _, num_panels, slots, slot_bytes = variant
            macros = defines(self._warps, *variant, epilogue, self._compiler.arch)
            cubin = self._compiler.cubin(SOURCE, macros)
            shared = shared_bytes(self._warps, slots, slot_bytes, num_panels)
            self._kernels[key] = Module(cubin).kernel("quant_gemv", PARAMETERS, shared)
        return self._kernels[key]


def defines(
    warps: int, types: int, num_panels: int, slots: int, slot_bytes: int, epilogue: int, arch: str
) -> dict[str, int]:
    """The macros of a variant."""
    return {
        "WARPS": warps,
        "TYPES": types,
        "NUM_PANELS": num_panels,
        "SLOTS": slots,
        "SLOT_BYTES": slot_bytes,
        "EPILOGUE": epilogue,
        "BULK_COPIES": int(arch not in WITHOUT_COPY_ENGINE),
    }


def shared_bytes(warps: int, slots: int, slot_bytes: int, num_panels: int) -> int:
    """Rings of all warps, and the sums of each lane of units, of two pieces in turn."""
    sums = warps // 4 * num_panels * PANEL_TOKENS * STRIPE_ROWS * 4
    return warps * slots * slot_bytes + 2 * sums


def _types_and_slot(matrix: PackedMatrix) -> tuple[int, int]:
    kinds = {segment.kind for segment in matrix.segments}
    types = sum(1 << kind.code for kind in kinds)
    return types, max(kind.tile_bytes for kind in kinds)


def deal(matrix: PackedMatrix, num_blocks: int) -> tuple[Table, Table, int, int]:
    """Cut the units of all stripes, in order, into runs of equal bytes.

    Returns:
        pieces (PIECE) `[num_blocks, most of a block]`, how many each block has `[num_blocks]`
        int32, and how many slots for partial sums and counters they use.
    """
    stripes = stripes_of(matrix)
    units = matrix.columns // BLOCK_COLUMNS
    weights = np.repeat([stripe.tile_bytes for stripe in stripes], units)
    ends = np.cumsum(weights)
    cuts = np.searchsorted(ends, np.arange(1, num_blocks) * (ends[-1] / num_blocks), side="right")
    bounds = [0, *cuts.tolist(), len(weights)]
    pieces: list[list[int]] = []
    counts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        before = len(pieces)
        while start < stop:
            index, first = divmod(start, units)
            count = min(units - first, stop - start)
            pieces.append([index, first, count])
            start += count
        counts.append(len(pieces) - before)
    table, num_slots, num_counters = _piece_table(pieces, stripes)
    by_block = np.zeros((num_blocks, max(counts)), PIECE)
    starts = [0, *accumulate(counts)]
    for block, (start, count) in enumerate(zip(starts, counts, strict=False)):
        by_block[block, :count] = table[start : start + count]
    return by_block, np.array(counts, np.int32), num_slots, num_counters


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
