"""Launches `rms_norm.cu`: RMS norm of rows, with or without adding to a residual first."""

from pathlib import Path

from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 4 + ("float32",)


def threads_for(columns: int) -> int:
    """A whole number of warps, a few values of four columns for each thread."""
    return max(32, min(1024, -(-columns // 8 // 32) * 32))


def defines(columns: int, add: bool, output: ElementType) -> dict[str, str | int]:
    """Macros of one variant."""
    assert columns % 4 == 0
    return {
        "COLUMNS": columns,
        "THREADS": threads_for(columns),
        "ADD": int(add),
        "OUTPUT_BF16": int(output is ElementType.BF16),
    }


class RmsNorm:
    """The kernel for rows of `columns` float32 values."""

    def __init__(
        self, device: Device, compiler: Compiler, columns: int, output: ElementType
    ) -> None:
        norm, add = (compiler.cubin(SOURCE, defines(columns, add, output)) for add in (False, True))
        self._norm = Module(norm).kernel("rms_norm", PARAMETERS)
        self._add = Module(add).kernel("rms_norm", PARAMETERS)
        self._stream = device.stream
        self._block = (threads_for(columns), 1, 1)

    def __call__(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        eps: float,
        output: DeviceArray,
        residual: DeviceArray | None = None,
        dependent: bool = False,
    ) -> None:
        """x / sqrt(mean(x²) + eps) * weight, for rows `[rows, columns]`.

        With `residual` (float32, of the same shape): residual += x, then the norm of the sum.
        """
        kernel = self._norm if residual is None else self._add
        grid = (x.shape[0], 1, 1)
        target = 0 if residual is None else residual
        kernel.launch(
            self._stream, grid, self._block, x, target, weight, output, eps, dependent=dependent
        )
