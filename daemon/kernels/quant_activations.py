"""Launches quant_activations: float32 rows to fp16 operands: as they are, normed, or gated."""

from pathlib import Path
from typing import Any

from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Kernel, Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer", "pointer", "pointer", "int32", "int32", "float32")
GROUP_TOKENS = 8
GROUP_COLUMNS = 8
PROMPT_THREADS = 256
"""Enough for many blocks side by side; a single token's block takes a thread a group."""

MAX_THREADS = 1024
MAX_GROUPS = 3
"""Of a thread, in registers."""


PANELS, CHUNKS = 0, 1
"""Layouts: for quant_gemv (up to 16 tokens), and for quant_gemm."""

PLAIN, NORMED, GATED = 0, 1, 2
KINDS = (PLAIN, NORMED, GATED)
"""What becomes of a row: itself, its RMS norm, or the SwiGLU of its halves."""


class ActivationKernels:
    """Two layouts of three kinds for each width, compiled when first used.

    The device's thread.
    """

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self._device = device
        self._compiler = compiler
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def operand(self, num_tokens: int, columns: int) -> DeviceArray:
        """Memory for an operand in either layout: `[padded_tokens(num_tokens), columns]` fp16."""
        return self._device.allocate((padded_tokens(num_tokens), columns), ElementType.F16)

    def convert(
        self,
        x: DeviceArray,
        out: DeviceArray,
        layout: int,
        norm: DeviceArray | None = None,
        eps: float = 1e-6,
    ) -> None:
        """Write `x` (float32 `[tokens, columns]`), times its RMS norm if given, into `out`.

        The norm's weight is float32 `[columns]`. Columns must be a multiple of 256.
        """
        num_tokens, columns = x.shape
        assert x.dtype is ElementType.F32
        assert columns % 256 == 0
        padded = padded_tokens(num_tokens)
        assert out.num_bytes >= padded * columns * 2
        arguments = (x, norm if norm is not None else 0, out, columns, padded, eps)
        self._launch(PLAIN if norm is None else NORMED, layout, num_tokens, columns, arguments)

    def gate(self, x: DeviceArray, out: DeviceArray, layout: int) -> None:
        """Write SiLU(g) u into `out`, from rows `[g | u]` of x, float32 `[tokens, 2 columns]`."""
        num_tokens, columns = x.shape[0], x.shape[1] // 2
        assert columns % 256 == 0
        padded = padded_tokens(num_tokens)
        assert out.num_bytes >= padded * columns * 2
        self._launch(GATED, layout, num_tokens, columns, (x, 0, out, columns, padded, 0.0))

    def _launch(
        self, kind: int, layout: int, num_tokens: int, columns: int, arguments: tuple[Any, ...]
    ) -> None:
        macros = defines(kind, layout, columns)
        kernel = self._kernel(macros)
        grid, block = (num_tokens, 1, 1), (macros["THREADS"], 1, 1)
        kernel.launch(self._device.stream, grid, block, *arguments, dependent=True)

    def _kernel(self, macros: dict[str, int]) -> Kernel:
        key = tuple(macros.values())
        kernel = self._kernels.get(key)
        if kernel is None:
            cubin = self._compiler.cubin(SOURCE, macros)
            kernel = Module(cubin).kernel("quant_activations", PARAMETERS)
            self._kernels[key] = kernel
        return kernel


def defines(kind: int, layout: int, columns: int) -> dict[str, int]:
    """The macros of a variant."""
    groups = columns // GROUP_COLUMNS
    wanted = groups if layout == PANELS else max(PROMPT_THREADS, -(-groups // MAX_GROUPS))
    threads = min(MAX_THREADS, -(-wanted // 32) * 32)
    per_thread = -(-groups // threads)
    return {"KIND": kind, "LAYOUT": layout, "THREADS": threads, "GROUPS": per_thread}


def padded_tokens(num_tokens: int) -> int:
    """Tokens of an operand, in whole groups of 8; those added may hold anything."""
    return -(-num_tokens // GROUP_TOKENS) * GROUP_TOKENS
