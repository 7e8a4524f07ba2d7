"""Rows of packed matrices are those of the file, bit for bit."""

import numpy as np
import pytest
from quant_reference import BLOCK_BYTES, file_values, random_matrix

pytest.importorskip("cuda.core")

from daemon.kernels import embed_tiles
from daemon.kernels.embed_tiles import EmbedTiles
from daemon.kernels.quant_pack import F32, FORMATS, Packer, RawMatrix
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device import Device

KINDS = sorted({format.kept_as for format in FORMATS.values()} - {F32})
ROWS, COLUMNS = 200, 768


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    for kind in KINDS:
        report = Compiler(arch, None).report(embed_tiles.SOURCE, {"TYPE": kind.code})
        assert report.kernels["embed_tiles"].spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("format", sorted(set(BLOCK_BYTES) - {"F32"}))
def test_rows_are_those_of_the_file(device: Device, compiler: Compiler, format: str) -> None:
    data = random_matrix(format, ROWS, COLUMNS, np.random.default_rng(1))
    packed = Packer(device, compiler).pack([RawMatrix(format, ROWS, COLUMNS, data.reshape(-1))])
    [segment] = packed.segments
    tokens = np.array([199, 0, 63, 64, -1, 17, 8], np.int32)
    output = device.allocate((len(tokens), COLUMNS), np.float32)
    device.fill(output, 0xFF)
    embed = EmbedTiles(device, compiler, segment.kind)
    embed(segment.tiles, device.to_device(tokens), output)
    expected = np.where(tokens[:, None] >= 0, file_values(format, data)[tokens], 0)
    np.testing.assert_array_equal(device.to_host(output), expected)
