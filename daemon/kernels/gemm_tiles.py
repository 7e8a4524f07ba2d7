"""Variants of the kernels that gemm_tiles.cuh makes, for one card: macros, shared memory, launches.

Refuses to know which tiles a launch has: quant_gemm and moe_prefill do. The device's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.kernel import Kernel, Module

HOPPER = "sm_90a"
WEIGHT_STAGES = 2
MIN_CHUNK_STAGES, CHUNK_STAGES = 2, 4
CHUNK_TOKEN_BYTES = 128
STATIC_SHARED_BYTES = 2048
"""Barriers, and the alignment of the ring to 1,024 bytes."""


class Rings(NamedTuple):
    """Shared memory of a block: chunks of activations on their way, and bytes in all."""

    chunk_stages: int
    num_bytes: int


def choose_rings(room: int, columns: int, unit_bytes: int, is_hopper: bool) -> Rings:
    """As many stages as help, in `room` bytes; fewer than MIN_CHUNK_STAGES do not work."""
    weights = WEIGHT_STAGES * unit_bytes * (2 if is_hopper else 1)
    stages = min(CHUNK_STAGES, (room - weights) // (columns * CHUNK_TOKEN_BYTES))
    aligned = 1024 if is_hopper else 0
    return Rings(stages, stages * columns * CHUNK_TOKEN_BYTES + weights + aligned)


class Variant(NamedTuple):
    """Types of weights as a bit mask, tokens a tile, bytes of the largest unit, what becomes of
    the sums."""

    types: int
    columns: int
    unit_bytes: int
    epilogue: int


class TileKernels:
    """One kernel's variants, compiled when first used.

    Args:
        source: named as its kernel.
        static_bytes: shared memory that the kernel has besides the rings and their barriers.
        macros: those of the kernel besides the ones of gemm_tiles.cuh.
    """

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        source: Path,
        parameters: tuple[str, ...],
        static_bytes: int = 0,
        macros: dict[str, int] | None = None,
    ) -> None:
        self._device = device
        self._compiler = compiler
        self._source = source
        self._parameters = parameters
        self._room = device.shared_bytes_per_block - STATIC_SHARED_BYTES - static_bytes
        self._macros = macros or {}
        self.is_hopper = compiler.arch == HOPPER
        self.widths = (256, 128, 64) if self.is_hopper else (128, 64)
        self._kernels: dict[Variant, Kernel] = {}

    def fits(self, columns: int, unit_bytes: int) -> bool:
        """Whether shared memory holds the rings of tiles of `columns` tokens."""
        return self._rings(columns, unit_bytes).chunk_stages >= MIN_CHUNK_STAGES

    def launch(self, variant: Variant, num_blocks: int, *arguments: Any) -> None:
        """On the device's stream, dependent."""
        rings = self._rings(variant.columns, variant.unit_bytes)
        self._kernel(variant, rings).launch(
            self._device.stream,
            (num_blocks, 1, 1),
            (384 if self.is_hopper else 128, 1, 1),
            *arguments,
            shared_bytes=rings.num_bytes,
            dependent=True,
        )

    def _rings(self, columns: int, unit_bytes: int) -> Rings:
        return choose_rings(self._room, columns, unit_bytes, self.is_hopper)

    def _kernel(self, variant: Variant, rings: Rings) -> Kernel:
        if variant not in self._kernels:
            macros = defines(*variant, rings.chunk_stages) | self._macros
            module = Module(self._compiler.cubin(self._source, macros))
            kernel = module.kernel(self._source.stem, self._parameters, rings.num_bytes)
            self._kernels[variant] = kernel
        return self._kernels[variant]


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
