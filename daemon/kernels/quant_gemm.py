"""Launches quant_gemm: the rows of a prompt times a packed matrix, dequantized on the way.

Owns the choice of tile width, which changes speed and never bits. The device's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from daemon.kernels.quant_activations import padded_tokens
from daemon.kernels.quant_gemv import ADD, STORE, SWIGLU, stripes_of
from daemon.kernels.quant_pack import BLOCK_COLUMNS, PackedMatrix
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Kernel, Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 4 + ("int32",) * 5
HOPPER = "sm_90a"
STORE_HALF = 4
"""STORE to an array of fp16."""

WEIGHT_STAGES = 2
MIN_CHUNK_STAGES, CHUNK_STAGES = 2, 4
CHUNK_TOKEN_BYTES = 128
STATIC_SHARED_BYTES = 2048
"""Barriers, and the alignment of the ring to 1,024 bytes."""

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


class Rings(NamedTuple):
    """Shared memory of gemm_tiles.cuh: chunks of activations on their way, and bytes in all."""

    chunk_stages: int
    num_bytes: int


def choose_rings(room: int, columns: int, unit_bytes: int, is_hopper: bool) -> Rings:
    """As many stages as help, in `room` bytes; fewer than MIN_CHUNK_STAGES do not work."""
    weights = WEIGHT_STAGES * unit_bytes * (2 if is_hopper else 1)
    stages = min(CHUNK_STAGES, (room - weights) // (columns * CHUNK_TOKEN_BYTES))
    aligned = 1024 if is_hopper else 0
    return Rings(stages, stages * columns * CHUNK_TOKEN_BYTES + weights + aligned)


class GemmKernels:
    """Plans and launches; kernels are compiled when first used."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self._device = device
        self._compiler = compiler
        self._hopper = compiler.arch == HOPPER
        self._kernels: dict[tuple[int, int, int, int], Kernel] = {}

    def plan(self, matrix: PackedMatrix) -> GemmPlan:
        """The table of a matrix's stripes, made once, when the model is loaded."""
        stripes = stripes_of(matrix)
        # A pair of stripes makes a Hopper tile: the last one may be read twice, written once.
        stripes += [stripes[-1]._replace(num_rows=0)] * (len(stripes) % 2)
        table = self._device.to_device(np.array(stripes, STRIPE).view(np.uint8))
        kinds = {segment.kind for segment in matrix.segments}
        types = sum(1 << kind.code for kind in kinds)
        unit_bytes = 4 * max(kind.tile_bytes for kind in kinds)
        return GemmPlan(matrix, table, len(stripes), types, unit_bytes)

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
        row_tiles = plan.num_stripes // 2 if self._hopper else plan.num_stripes
        columns = self._tile_columns(row_tiles, num_tokens)
        tiles = row_tiles * -(-num_tokens // columns)
        rows_out, chunks_out = (0, out) if swiglu else (out, 0)
        self._kernel(plan.types, columns, plan.unit_bytes, epilogue).launch(
            self._device.stream,
            (min(tiles, self._device.num_sms) if self._hopper else tiles, 1, 1),
            (384 if self._hopper else 128, 1, 1),
            *(plan.stripes, chunks, rows_out, chunks_out, matrix.columns // BLOCK_COLUMNS),
            *(row_tiles, num_tokens, padded, stride),
            shared_bytes=self._rings(columns, plan.unit_bytes).num_bytes,
            dependent=True,
        )

    def _tile_columns(self, row_tiles: int, num_tokens: int) -> int:
        """Tokens a tile, for the least time in whole waves; a tile costs a little more than its
        tokens."""

        def cost(columns: int) -> int:
            tiles = row_tiles * -(-num_tokens // columns)
            return -(-tiles // self._device.num_sms) * (columns + 16)

        return min((256, 128, 64) if self._hopper else (128, 64), key=cost)

    def _rings(self, columns: int, unit_bytes: int) -> Rings:
        room = self._device.shared_bytes_per_block - STATIC_SHARED_BYTES
        return choose_rings(room, columns, unit_bytes, self._hopper)

    def _kernel(self, types: int, columns: int, unit_bytes: int, epilogue: int) -> Kernel:
        key = (types, columns, unit_bytes, epilogue)
        if key not in self._kernels:
            rings = self._rings(columns, unit_bytes)
            cubin = self._compiler.cubin(SOURCE, defines(*key, rings.chunk_stages))
            kernel = Module(cubin).kernel("quant_gemm", PARAMETERS, rings.num_bytes)
            self._kernels[key] = kernel
        return self._kernels[key]


def defines(
    types: int, columns: int, unit_bytes: int, epilogue: int, chunk_stages: int
) -> dict[str, int]:
    """The macros of a variant."""
    return {
        "TYPES": types,
        "COLUMNS": columns,
        "UNIT_BYTES": unit_bytes,
        "EPILOGUE": epilogue,
        "WEIGHT_STAGES": WEIGHT_STAGES,
        "CHUNK_STAGES": chunk_stages,
    }
