"""Launches `moe_rows.cu` and `moe_gemm.cu`: the experts of a prompt's rows.

Owns the choice of tile width, which changes speed and never bits. The device's thread.
"""

from __future__ import annotations

from pathlib import Path

from daemon.kernels.gemm_tiles import TileKernels, Variant
from daemon.kernels.moe_pack import (
    GATE,
    ExpertMatrix,
    GatedExperts,
    gate_up_steps,
    kinds_of,
)
from daemon.kernels.moe_route import MoeSizes, RowLines
from daemon.kernels.quant_gemv import STORE
from daemon.kernels.quant_pack import types_and_tile
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

GEMM_SOURCE = Path(__file__).with_name("moe_gemm.cu")
ROWS_SOURCE = Path(__file__).with_name("moe_rows.cu")
GEMM_PARAMETERS = ("pointer",) * 6 + ("int32",) * 10
SCATTER_PARAMETERS = ("pointer",) * 6 + ("int32",) * 2 + ("float32",)
COMBINE_PARAMETERS = ("pointer",) * 4 + ("int32",)
THREADS = 256
BLOCKS_PER_SM = 2
"""Of moe_gemm where it is not persistent by design: enough to hide what a block waits for."""


class MoePrefill:
    """Kernels and workspace for one model's experts; the products are compiled when first used.

    Args:
        max_width: the most rows of a down matrix's input, of the routed and the shared experts.
        max_rows: of a prompt.
    """

    def __init__(
        self, device: Device, compiler: Compiler, sizes: MoeSizes, max_width: int, max_rows: int
    ) -> None:
        self._device = device
        self._sizes = sizes
        module = Module(compiler.cubin(ROWS_SOURCE, rows_defines(sizes)))
        self._scatter = module.kernel("moe_scatter", SCATTER_PARAMETERS)
        self._combine = module.kernel("moe_combine", COMBINE_PARAMETERS)
        ends_bytes = 4 * (sizes.num_experts + 1)
        own = {"EXPERTS": sizes.num_experts}
        self._products = TileKernels(
            device, compiler, GEMM_SOURCE, GEMM_PARAMETERS, ends_bytes, own
        )
        lines = self._num_lines(max_rows)
        # Rows in, and `up` where it lies apart, are used up before the experts' rows are written.
        line_bytes = max(2 * sizes.columns + 4 * max_width, 4 * sizes.columns)
        self._max_width = max_width
        self._space = device.allocate((lines, line_bytes), ElementType.U8)
        self._middle = device.allocate((lines, max_width), ElementType.F16)

    def mix(
        self,
        gate_up: tuple[GatedExperts, GatedExperts | None],
        down: tuple[ExpertMatrix, ExpertMatrix | None],
        norm: DeviceArray,
        gate: DeviceArray | None,
        lines: RowLines,
        residual: DeviceArray,
        eps: float,
    ) -> None:
        """Add the weighted sum of each row's experts to `residual`, f32 `[rows, columns]`.

        Args:
            gate_up, down: of the routed experts, and of the shared one.
            gate: f32 `[columns]`, the shared expert's row of the router.
            lines: of MoeRoute.many, for these rows.
        """
        rows, columns = residual.shape
        num_lines = self._num_lines(rows)
        x = self._space.view((num_lines, columns), ElementType.F16)
        wide = (num_lines, self._max_width)
        up = self._space.view(wide, ElementType.F32, offset_bytes=x.num_bytes)
        self._scatter.launch(
            self._device.stream, (rows, 1, 1), (THREADS, 1, 1),
            residual, norm, gate if gate is not None else 0, lines.places, lines.weights, x,
            rows, num_lines, eps, dependent=True,
        )  # fmt: skip
        for step in gate_up_steps(*gate_up):
            matrices = (step.routed, step.shared)
            self._multiply(matrices, lines, x, rows, step.epilogue, up, self._middle)
        made = self._space.view((num_lines, columns), ElementType.F32)
        self._multiply(down, lines, self._middle, rows, STORE, made, None)
        self._combine.launch(
            self._device.stream, (rows, 1, 1), (THREADS, 1, 1),
            made, lines.places, lines.weights, residual, rows, dependent=True,
        )  # fmt: skip

    def _multiply(
        self,
        matrices: tuple[ExpertMatrix | None, ExpertMatrix | None],
        lines: RowLines,
        x: DeviceArray,
        rows: int,
        epilogue: int,
        out: DeviceArray,
        chunks: DeviceArray | None,
    ) -> None:
        types, tile_bytes = types_and_tile(kinds_of(*matrices))
        columns = self._tile_columns(rows, epilogue, 4 * tile_bytes)
        self._products.launch(
            Variant(types, columns, 4 * tile_bytes, epilogue),
            self._device.num_sms * (1 if self._products.is_hopper else BLOCKS_PER_SM),
            *(matrix.tiles if matrix is not None else 0 for matrix in matrices),
            *(lines.first, x, out, chunks if chunks is not None else 0),
            *(field for matrix in matrices for field in _form(matrix)),
            *(self._num_lines(rows), out.shape[1]),
        )

    def _num_lines(self, rows: int) -> int:
        return rows * (self._sizes.num_used + int(self._sizes.has_shared))

    def _tile_columns(self, rows: int, epilogue: int, unit_bytes: int) -> int:
        """Tokens a tile: half of an expert's last tile is empty, and each costs some more."""
        mean = rows * self._sizes.num_used / self._sizes.num_experts

        def cost(columns: int) -> float:
            return max(1.0, mean / columns + 0.5) * (columns + 32)

        def fits(columns: int) -> bool:
            is_small = columns <= 128 or epilogue != GATE
            return is_small and self._products.fits(columns, unit_bytes)

        return min(filter(fits, self._products.widths), key=cost)


def _form(matrix: ExpertMatrix | None) -> tuple[int, int, int, int]:
    """Type, bytes of a tile, stripes and blocks of an expert."""
    if matrix is None:
        return (0, 0, 0, 0)
    return (matrix.kind.code, matrix.kind.tile_bytes, matrix.stripes, matrix.blocks)


def rows_defines(sizes: MoeSizes) -> dict[str, int]:
    """The macros of moe_rows.cu."""
    return {
        "COLUMNS": sizes.columns,
        "USED": sizes.num_used,
        "SHARED": int(sizes.has_shared),
    }
