"""Repacked weights keep their values bit for bit."""

import numpy as np
import pytest
from quant_reference import (
    BLOCK_BYTES,
    FLOAT_BOUND,
    KEPT_AS,
    REST_BOUND,
    file_values,
    float_matrix,
    of_any_magnitude,
    packed_values,
    random_matrix,
)

pytest.importorskip("cuda.core")

from daemon.errors import UnsupportedModel
from daemon.kernels.quant_pack import (
    FORMATS,
    SOURCE,
    Packer,
    RawMatrix,
    can_pair,
)
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.upload import Uploader


def raw(format: str, rows: int, columns: int, seed: int = 0) -> RawMatrix:
    data = random_matrix(format, rows, columns, np.random.default_rng(seed))
    return RawMatrix(format, rows, columns, data.reshape(-1))


@pytest.mark.parametrize("format", sorted(BLOCK_BYTES))
def test_the_reference_agrees_with_the_gguf_package(format: str) -> None:
    quants = pytest.importorskip("gguf").quants
    kinds = pytest.importorskip("gguf").GGMLQuantizationType
    data = random_matrix(format, 3, 512, np.random.default_rng(1))
    np.testing.assert_array_equal(file_values(format, data), quants.dequantize(data, kinds[format]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    for format in FORMATS.values():
        defines = {"TYPE": format.kept_as.code, "FROM": format.source}
        report = Compiler(arch, None).report(SOURCE, defines)
        assert report.kernels["quant_pack"].spill_bytes == 0


def test_only_equal_shapes_and_formats_pair() -> None:
    gate = raw("Q4_0", 64, 256)
    assert can_pair(gate, raw("Q4_0", 64, 256))
    assert not can_pair(gate, raw("Q8_0", 64, 256))
    assert not can_pair(raw("Q4_0", 48, 256), raw("Q4_0", 48, 256))
    assert not can_pair(raw("F32", 64, 256), raw("F32", 64, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("format", sorted(BLOCK_BYTES))
def test_tiles_hold_the_file_values(device: Device, compiler: Compiler, format: str) -> None:
    part = raw(format, 200, 768)
    # Small buffers cut the matrix into several runs.
    uploader = Uploader(device, buffer_bytes=64 * 768 * 5)
    packer = Packer(device, compiler, uploader)
    packed = packer.pack([part])
    uploader.finish()
    tiles = device.to_host(packed.segments[0].tiles)
    values = packed_values(KEPT_AS.get(format, format), tiles, 256)
    expected = file_values(format, part.data.reshape(200, -1))
    if format == "F32":
        assert_near(values[:200], expected, FLOAT_BOUND)
    else:
        np.testing.assert_array_equal(values[:200], expected)
    np.testing.assert_array_equal(values[200:], 0)


def assert_near(values: np.ndarray, expected: np.ndarray, bound: float) -> None:  # type: ignore[type-arg]
    size = np.abs(expected.astype(np.float64))
    error = np.abs(values.astype(np.float64) - expected)
    assert (error <= bound * size + REST_BOUND * size.max(-1, keepdims=True)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "bound"), [("BF16", 0.0), ("F32", FLOAT_BOUND)])
def test_floats_of_any_magnitude_keep_their_values(
    device: Device, compiler: Compiler, format: str, bound: float
) -> None:
    data = float_matrix(format, of_any_magnitude(80, 1280, np.random.default_rng(4)))
    part = RawMatrix(format, 80, 1280, data.reshape(-1))
    packed = Packer(device, compiler).pack([part])
    tiles = device.to_host(packed.segments[0].tiles)
    values = packed_values(KEPT_AS.get(format, format), tiles, 80)
    assert_near(values, file_values(format, data), bound)


@pytest.mark.gpu
def test_parts_of_a_stack_follow_one_another(device: Device, compiler: Compiler) -> None:
    parts = [raw("F32", 64, 512, seed) for seed in range(3)]
    packer = Packer(device, compiler)
    stack = packer.pack_stack(parts).segments[0]
    alone = [device.to_host(packer.pack([part]).segments[0].tiles) for part in parts]
    np.testing.assert_array_equal(device.to_host(stack.tiles), np.concatenate(alone))


@pytest.mark.gpu
def test_paired_rows_alternate_in_groups_of_8(device: Device, compiler: Compiler) -> None:
    gate, up = raw("Q6_K", 96, 512, 1), raw("Q6_K", 96, 512, 2)
    packed = Packer(device, compiler).pack_paired(gate, up)
    values = packed_values("Q6_K", device.to_host(packed.segments[0].tiles), 192)
    both = values.reshape(12, 2, 8, 512).transpose(1, 0, 2, 3).reshape(2, 96, 512)
    np.testing.assert_array_equal(both[0], file_values("Q6_K", gate.data.reshape(96, -1)))
    np.testing.assert_array_equal(both[1], file_values("Q6_K", up.data.reshape(96, -1)))


@pytest.mark.gpu
def test_refusals(device: Device, compiler: Compiler) -> None:
    packer = Packer(device, compiler)
    with pytest.raises(UnsupportedModel, match="IQ2_S"):
        packer.pack([RawMatrix("IQ2_S", 1, 256, np.zeros(82, np.uint8))])
    with pytest.raises(UnsupportedModel, match="not 320"):
        packer.pack([RawMatrix("Q8_0", 1, 320, np.zeros(340, np.uint8))])
