"""Launches quant_gemm: the rows of a prompt times a packed matrix, dequantized on the way.

Owns the choice of tile width, which changes speed and never bits. The device's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from daemon.kernels.gemm_tiles import TileKernels, Variant
from daemon.kernels.quant_activations import padded_tokens
from daemon.kernels.quant_gemv import ADD, STORE, SWIGLU, stripes_of
from daemon.kernels.quant_pack import BLOCK_COLUMNS, PackedMatrix, types_and_tile
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 4 + ("int32",) * 5
STORE_HALF = 4
"""STORE to an array of fp16."""

STRIPE = np.dtype(
    [
        ("units", np.uint64),
        ("kind", np.int32),
        ("tile_bytes", np.int32),
        ("row", np.int32),
        ("num_rows", np.int32),
    ],
    align=True,
)
"""struct Stripe of quant_gemm.cu."""


class GemmPlan(NamedTuple):
    """A matrix and the table of its stripes on the device, padded to an even number."""

    matrix: PackedMatrix
    stripes: DeviceArray
    num_stripes: int
    types: int
    unit_bytes: int


class GemmKernels:
    """Plans and launches; kernels are compiled when first used."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self._device = device
        self._kernels = TileKernels(device, compiler, SOURCE, PARAMETERS)

    def plan(self, matrix: PackedMatrix) -> GemmPlan:
        """The table of a matrix's stripes, made once, when the model is loaded."""
        stripes = stripes_of(matrix)
        # A pair of stripes makes a Hopper tile: the last one may be read twice, written once.
        stripes += [stripes[-1]._replace(num_rows=0)] * (len(stripes) % 2)
        table = self._device.to_device(np.array(stripes, STRIPE).view(np.uint8))
        types, tile_bytes = types_and_tile(segment.kind for segment in matrix.segments)
        return GemmPlan(matrix, table, len(stripes), types, 4 * tile_bytes)

    def multiply(
        self, plan: GemmPlan, chunks: DeviceArray, num_tokens: int, out: DeviceArray, epilogue: int
    ) -> None:
        """Multiply the rows of a prompt.

        Args:
            chunks: the rows in quant_activations' CHUNKS layout, or an earlier SWIGLU's output.
            out: float32 `[num_tokens, rows]` for ADD, that or fp16 for STORE; chunks for SWIGLU.
        """
        matrix, swiglu = plan.matrix, epilogue == SWIGLU
        assert matrix.paired == swiglu
        assert epilogue in (STORE, ADD, SWIGLU)
        if epilogue == STORE and out.dtype is ElementType.F16:
            epilogue = STORE_HALF
        stride = matrix.rows // 2 if swiglu else matrix.rows
        padded = padded_tokens(num_tokens)
        assert chunks.num_bytes >= padded * matrix.columns * 2
        assert out.num_bytes >= (
            padded * stride * 2 if swiglu else num_tokens * stride * out.dtype.num_bytes
        )
        row_tiles = plan.num_stripes // 2 if self._kernels.is_hopper else plan.num_stripes
        columns = self._tile_columns(row_tiles, num_tokens)
        tiles = row_tiles * -(-num_tokens // columns)
        rows_out, chunks_out = (0, out) if swiglu else (out, 0)
        self._kernels.launch(
            Variant(plan.types, columns, plan.unit_bytes, epilogue),
            min(tiles, self._device.num_sms) if self._kernels.is_hopper else tiles,
            *(plan.stripes, chunks, rows_out, chunks_out, matrix.columns // BLOCK_COLUMNS),
            *(row_tiles, num_tokens, padded, stride),
        )

    def _tile_columns(self, row_tiles: int, num_tokens: int) -> int:
        """Tokens a tile, for the least time in whole waves; a tile costs a little more than its
        tokens."""

        def cost(columns: int) -> int:
            tiles = row_tiles * -(-num_tokens // columns)
            return -(-tiles // self._device.num_sms) * (columns + 16)

        return min(self._kernels.widths, key=cost)
