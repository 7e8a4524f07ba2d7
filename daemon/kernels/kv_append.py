"""Launches `kv_append.cu`: norm, rotation, and append of new tokens to the KV pages."""

from pathlib import Path

from daemon.kernels.kv_format import KvLayout
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
HEADS_PER_BLOCK = 8
THREADS = HEADS_PER_BLOCK * 32
PARAMETERS = ("pointer",) * 9 + ("float32",) * 2 + ("int32",) * 4 + ("int64",) * 2


def defines(layout: KvLayout, projection: ElementType) -> dict[str, str | int]:
    """Macros for a layout and the element type of projected rows (F32 or F16)."""
    assert projection in (ElementType.F32, ElementType.F16)
    return {**layout.defines, "PROJECTION_F16": int(projection is ElementType.F16)}


class KvAppend:
    """The kernel for one layout of pages and one type of projected rows."""

    def __init__(
        self, device: Device, compiler: Compiler, layout: KvLayout, projection: ElementType
    ) -> None:
        cubin = compiler.cubin(SOURCE, defines(layout, projection))
        self._kernel = Module(cubin).kernel("kv_append", PARAMETERS)
        self._stream = device.stream
        self._layout = layout

    def __call__(
        self,
        projections: DeviceArray,
        positions: DeviceArray,
        sequences: DeviceArray,
        page_table: DeviceArray,
        pool: DeviceArray,
        layer: int,
        queries: DeviceArray,
        norms: tuple[DeviceArray, DeviceArray],
        frequencies: DeviceArray,
        magnitude: float,
        eps: float,
        dependent: bool = False,
    ) -> None:
        """Append rows to `layer`'s pages and write their rotated queries.

        Args:
            projections: `[rows, (query | gate) per head | keys | values]`; padding may follow.
            positions: i32 `[rows]`; negative rows are skipped.
            sequences: i32 `[rows]`, the row's line of `page_table` i32 `[sequences, pages]`.
            pool: u8 `[pages, page_bytes]`.
            queries: 16-bit `[rows, q_heads, 256]`, written.
            norms: f32 `[256]` of queries and of keys.
            frequencies: f64 `[32]`, angle per position.
        """
        rows, q_heads, _ = queries.shape
        assert positions.shape == sequences.shape == (rows,)
        self._kernel.launch(
            self._stream,
            (rows, -(-(q_heads + 2 * self._layout.kv_heads) // HEADS_PER_BLOCK), 1),
            (THREADS, 1, 1),
            projections,
            positions,
            sequences,
            page_table,
            pool,
            queries,
            *norms,
            frequencies,
            magnitude,
            eps,
            projections.shape[1],
            page_table.shape[1],
            q_heads,
            self._layout.kv_heads,
            self._layout.page_bytes,
            self._layout.layer_offset(layer),
            dependent=dependent,
        )
