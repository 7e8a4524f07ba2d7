"""Quantized matrices on the device: GGUF blocks repacked into tiles that stream and multiply fast.

Owns which formats are kept as they are and which are converted, and where each row goes; the tile
layout itself is described in include/quant_blocks.cuh. The device's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from daemon.errors import UnsupportedModel
from daemon.kernels.quant_convert import CONVERTED, as_q8_0
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Kernel, Module
from daemon.kernels.runtime.upload import Bytes, Uploader

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer", "pointer", "int32", "int32", "int32")

STRIPE_ROWS = 64
BLOCK_COLUMNS = 256
SCALED_BLOCKS = 16
"""Of 256 columns, that a thread block repacks after it has read whole rows for their factors."""


class QuantType(NamedTuple):
    """How a matrix is kept: the code, tile size and rows of four tiles of quant_blocks.cuh."""

    code: int
    tile_bytes: int
    stripe_rows: int = STRIPE_ROWS


def types_and_tile(kinds: Iterable[QuantType]) -> tuple[int, int]:
    """The bit mask of some types, and the bytes of their largest tile."""
    some = set(kinds)
    return sum(1 << kind.code for kind in some), max(kind.tile_bytes for kind in some)


class FileFormat(NamedTuple):
    """How a GGUF file stores 256 columns of a row, and what they become."""

    file_bytes: int
    kept_as: QuantType
    source: int = 0

    @property
    def is_scaled(self) -> bool:
        """Whether each row gets a factor, for which the whole of it is read first."""
        return self.source > 0


Q4_K, Q5_K, Q6_K = QuantType(0, 2304), QuantType(1, 2816), QuantType(2, 3360)
Q8_0, IQ4_XS, Q4_0 = QuantType(3, 4352), QuantType(4, 2176), QuantType(5, 2304)
F16, F32 = QuantType(6, 8256), QuantType(7, 8256, 32)

FORMATS = {
    "Q4_K": FileFormat(144, Q4_K),
    "Q5_K": FileFormat(176, Q5_K),
    "Q6_K": FileFormat(210, Q6_K),
    "Q8_0": FileFormat(272, Q8_0),
    "IQ4_XS": FileFormat(136, IQ4_XS),
    "Q4_0": FileFormat(144, Q4_0),
    "F16": FileFormat(512, F16, 0),
    "BF16": FileFormat(512, F16, 1),
    "F32": FileFormat(1024, F32, 2),
}
"""What is kept without conversion; quant_pack.cu says how near BF16 and F32 stay."""


class RawMatrix(NamedTuple):
    """Rows as a file has them: `data` is `[rows * bytes of a row]` uint8 of format `format`."""

    format: str
    rows: int
    columns: int
    data: Bytes

    def rows_between(self, start: int, stop: int) -> RawMatrix:
        """Some of the rows, without copying."""
        row_bytes = len(self.data) // self.rows
        data = self.data[start * row_bytes : stop * row_bytes]
        return RawMatrix(self.format, stop - start, self.columns, data)


class Segment(NamedTuple):
    """Consecutive output rows of one type. `tiles` are whole stripes, padded with zero rows."""

    kind: QuantType
    first_row: int
    rows: int
    tiles: DeviceArray


class PackedMatrix(NamedTuple):
    """A matrix `[rows, columns]` on the device, as the segments of its parts.

    `paired`: two parts of equal shape whose rows alternate in groups of 8, for a fused SwiGLU.
    """

    rows: int
    columns: int
    segments: tuple[Segment, ...]
    paired: bool

    @property
    def num_bytes(self) -> int:
        """Device memory of all segments."""
        return sum(segment.tiles.num_bytes for segment in self.segments)


class Packer:
    """Uploads matrices and repacks them on the device.

    Args:
        uploader: what is sent through it is complete after its `finish`; without one, each matrix
            is complete when its method returns.
    """

    def __init__(
        self, device: Device, compiler: Compiler, uploader: Uploader | None = None
    ) -> None:
        self._device = device
        self._compiler = compiler
        self._uploader = uploader or Uploader(device)
        self._finish = self._uploader.finish if uploader is None else lambda: None
        self._kernels: dict[tuple[int, int], Kernel] = {}

    def pack(self, parts: Sequence[RawMatrix]) -> PackedMatrix:
        """The rows of all parts stacked, each part in its own format.

        Raises:
            UnsupportedModel: a format that is not known, or columns that are no multiple of 256.
            OutOfDeviceMemory: it does not fit.
        """
        columns, segments, row = parts[0].columns, [], 0
        for part in parts:
            assert part.columns == columns
            kept_as = kept_format(part).kept_as
            tiles = self._empty_tiles(kept_as, part.rows, columns)
            self._fill(part, tiles, -1)
            segments.append(Segment(kept_as, row, part.rows, tiles))
            row += part.rows
        self._finish()
        return PackedMatrix(row, columns, tuple(segments), paired=False)

    def pack_stack(self, parts: Sequence[RawMatrix]) -> PackedMatrix:
        """The rows of parts of one format that fill stripes, as a single segment."""
        kind, columns = kept_format(parts[0]).kept_as, parts[0].columns
        rows = sum(part.rows for part in parts)
        tiles = self._empty_tiles(kind, rows, columns)
        stripe = 0
        for part in parts:
            assert part.format == parts[0].format
            assert part.rows % kind.stripe_rows == 0
            self._fill(part, tiles.rows(stripe, tiles.shape[0]), -1)
            stripe += part.rows // kind.stripe_rows
        self._finish()
        return PackedMatrix(rows, columns, (Segment(kind, 0, rows, tiles),), paired=False)

    def pack_paired(self, gate: RawMatrix, up: RawMatrix) -> PackedMatrix:
        """Gate and up rows alternating in groups of 8; both must be of one format (`can_pair`)."""
        return self.pack_pairs([(gate, up)])

    def pack_pairs(self, pairs: Sequence[tuple[RawMatrix, RawMatrix]]) -> PackedMatrix:
        """Several such pairs, all of one format and width, one after the other."""
        format, columns = kept_format(pairs[0][0]).kept_as, pairs[0][0].columns
        rows = 2 * sum(gate.rows for gate, _ in pairs)
        tiles = self._empty_tiles(format, rows, columns)
        stripe = 0
        for gate, up in pairs:
            assert can_pair(gate, up)
            target = tiles.rows(stripe, tiles.shape[0])
            self._fill(gate, target, 0)
            self._fill(up, target, 1)
            stripe += 2 * gate.rows // STRIPE_ROWS
        self._finish()
        segment = Segment(format, 0, rows, tiles)
        return PackedMatrix(rows, columns, (segment,), paired=True)

    def copy_rows(self, part: RawMatrix) -> DeviceArray:
        """The rows as the file has them, or converted: u8 `[rows, bytes of a row]`, not packed."""
        row_bytes = part.columns // BLOCK_COLUMNS * kept_format(part).file_bytes
        target = self._device.allocate((part.rows, row_bytes), np.uint8)
        run = self._uploader.buffer_bytes // row_bytes
        for start in range(0, part.rows, run):
            stop = min(start + run, part.rows)
            fill = partial(write_readable, part.rows_between(start, stop))
            self._uploader.send_to(target.rows(start, stop), fill)
        self._finish()
        return target

    def _empty_tiles(self, kind: QuantType, rows: int, columns: int) -> DeviceArray:
        stripes, blocks = -(-rows // kind.stripe_rows), columns // BLOCK_COLUMNS
        tiles = self._device.allocate((stripes, blocks, 4, kind.tile_bytes), np.uint8)
        self._device.fill(tiles.rows(stripes - 1, stripes), 0)
        return tiles

    def _fill(self, part: RawMatrix, tiles: DeviceArray, pairing: int) -> None:
        """Send runs of whole stripes and repack each where it lands."""
        format = kept_format(part)
        blocks = part.columns // BLOCK_COLUMNS
        row_bytes = blocks * format.file_bytes
        run = self._uploader.buffer_bytes // row_bytes // STRIPE_ROWS * STRIPE_ROWS
        assert run > 0
        kernel = self._kernel(format)
        for start in range(0, part.rows, run):
            rows = part.rows_between(start, min(start + run, part.rows))
            first_stripe = start * (1 if pairing < 0 else 2) // format.kept_as.stripe_rows
            target = tiles.rows(first_stripe, tiles.shape[0])
            shares = -(-blocks // SCALED_BLOCKS) if format.is_scaled else blocks
            grid = (-(-rows.rows // 8), shares, 1)
            self._uploader.send(
                rows.rows * row_bytes,
                partial(write_readable, rows),
                partial(self._repack, kernel, grid, target, rows.rows, blocks, pairing),
            )

    def _repack(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        target: DeviceArray,
        rows: int,
        blocks: int,
        pairing: int,
        raw: DeviceArray,
    ) -> None:
        arguments = (raw, target, rows, blocks, pairing)
        kernel.launch(self._device.stream, grid, (256, 1, 1), *arguments)

    def _kernel(self, format: FileFormat) -> Kernel:
        key = (format.kept_as.code, format.source)
        if key not in self._kernels:
            defines = {"TYPE": key[0], "FROM": key[1]}
            cubin = self._compiler.cubin(SOURCE, defines)
            self._kernels[key] = Module(cubin).kernel("quant_pack", PARAMETERS)
        return self._kernels[key]


def can_pair(gate: RawMatrix, up: RawMatrix) -> bool:
    """Whether two matrices can be interleaved for a fused SwiGLU."""
    if kept_format(gate).kept_as is F32:
        return False
    same = (gate.format, gate.rows, gate.columns) == (up.format, up.rows, up.columns)
    return same and gate.rows % 32 == 0


def kept_format(part: RawMatrix) -> FileFormat:
    """What a matrix is read as.

    Raises:
        UnsupportedModel: its format is not known, or its columns are no multiple of 256.
    """
    if part.columns % BLOCK_COLUMNS:
        raise UnsupportedModel(f"the GPU needs rows of a multiple of 256, not {part.columns}")
    name = "Q8_0" if part.format in CONVERTED else part.format
    if name not in FORMATS:
        raise UnsupportedModel(f"the GPU cannot read {part.format} weights")
    return FORMATS[name]


def write_readable(part: RawMatrix, target: Bytes) -> None:
    """Write the bytes of a matrix in its own format, or in that to which it is converted."""
    is_converted = part.format in CONVERTED
    np.copyto(target, as_q8_0(part.format, part.rows, part.data) if is_converted else part.data)
