"""Launches `embed_rows.cu`: rows of a quantized table, in the file's own layout, to float32."""

from pathlib import Path

from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 3 + ("int32", "int64")
THREADS = 256
FORMATS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_XS": 23, "BF16": 30,
}  # fmt: skip
"""Name of each format that can be embedded, and its GGUF type id."""


def defines(format_name: str) -> dict[str, str | int]:
    """Macros for one of FORMATS."""
    return {"FORMAT": FORMATS[format_name], "THREADS": THREADS}


class EmbedRows:
    """The kernel for one format."""

    def __init__(self, device: Device, compiler: Compiler, format_name: str) -> None:
        cubin = compiler.cubin(SOURCE, defines(format_name))
        self._kernel = Module(cubin).kernel("embed_rows", PARAMETERS)
        self._stream = device.stream

    def __call__(
        self, table: DeviceArray, tokens: DeviceArray, output: DeviceArray, dependent: bool = False
    ) -> None:
        """output[i] = table[tokens[i]].

        Args:
            table: u8 `[table rows, bytes of a row]`, the tensor as it is in the file.
            tokens: i32 `[rows]`, below the table's rows; a negative one gives zeros.
            output: f32 `[rows, columns]`.
        """
        rows, columns = output.shape
        assert tokens.shape == (rows,)
        self._kernel.launch(
            self._stream,
            (rows, 1, 1),
            (THREADS, 1, 1),
            table,
            tokens,
            output,
            columns,
            table.shape[1],
            dependent=dependent,
        )
