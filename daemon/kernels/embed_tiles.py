"""Launches `embed_tiles.cu`: rows of a packed matrix to float32, where it is the embedding too."""

from pathlib import Path

from daemon.kernels.quant_pack import BLOCK_COLUMNS, QuantType
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 3 + ("int32",)
THREADS = BLOCK_COLUMNS


class EmbedTiles:
    """The kernel for one type of tiles."""

    def __init__(self, device: Device, compiler: Compiler, kind: QuantType) -> None:
        cubin = compiler.cubin(SOURCE, {"TYPE": kind.code})
        self._kernel = Module(cubin).kernel("embed_tiles", PARAMETERS)
        self._stream = device.stream

    def __call__(
        self, tiles: DeviceArray, tokens: DeviceArray, output: DeviceArray, dependent: bool = False
    ) -> None:
        """output[i] = row tokens[i] of the matrix.

        Args:
            tiles: u8 `[stripes, column blocks, 4, tile bytes]`, a segment that begins at row 0.
            tokens: i32 `[rows]`, below the matrix's rows; a negative one gives zeros.
            output: f32 `[rows, columns]`.
        """
        rows, columns = output.shape
        assert tokens.shape == (rows,)
        assert columns == tiles.shape[1] * BLOCK_COLUMNS
        grid, block = (rows, 1, 1), (THREADS, 1, 1)
        arguments = (tiles, tokens, output, tiles.shape[1])
        self._kernel.launch(self._stream, grid, block, *arguments, dependent=dependent)
