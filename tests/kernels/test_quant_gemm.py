"""Prompts times quantized matrices: right, and the same bits however the prompt is cut."""

import numpy as np
import pytest
from quant_reference import (
    BLOCK_BYTES,
    assert_exact,
    file_values,
    float_matrix,
    of_any_magnitude,
    random_matrix,
)

pytest.importorskip("cuda.core")

from daemon.kernels import gemm_tiles, quant_gemm
from daemon.kernels.gemm_tiles import MIN_CHUNK_STAGES, choose_rings
from daemon.kernels.quant_activations import CHUNKS, ActivationKernels
from daemon.kernels.quant_gemm import STORE_HALF, GemmKernels
from daemon.kernels.quant_gemv import ADD, STORE, SWIGLU
from daemon.kernels.quant_pack import F16, F32, FORMATS, Packer, RawMatrix
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

TOLERANCE = 1e-3
"""Of the norm: weights and activations are rounded to fp16, sums are float32."""


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("epilogue", [ADD, SWIGLU, STORE_HALF])
def test_compiles_with_few_spills_and_no_serialized_products(arch: str, epilogue: int) -> None:
    columns = 256 if arch == "sm_90a" else 128
    defines = gemm_tiles.defines(5, columns, 13440, epilogue, 3)
    report = Compiler(arch, None).report(quant_gemm.SOURCE, defines)
    assert report.kernels["quant_gemm"].spill_bytes <= 40
    assert not report.serialized_wgmma


@pytest.mark.parametrize("limit", [99 * 1024, 163 * 1024, 227 * 1024])
def test_rings_fit_the_shared_memory_of_every_card(limit: int) -> None:
    is_hopper, room = limit > 200 * 1024, limit - gemm_tiles.STATIC_SHARED_BYTES
    for kind in {format.kept_as for format in FORMATS.values()}:
        for columns in (64, 128, 256) if is_hopper else (64, 128):
            rings = choose_rings(room, columns, 4 * kind.tile_bytes, is_hopper)
            assert rings.chunk_stages >= MIN_CHUNK_STAGES
            assert rings.num_bytes <= limit


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_floats_compile_with_few_spills_and_no_serialized_products(arch: str) -> None:
    types = (1 << F16.code) + (1 << F32.code)
    defines = gemm_tiles.defines(types, 128, 4 * F32.tile_bytes, STORE_HALF, 2)
    report = Compiler(arch, None).report(quant_gemm.SOURCE, defines)
    assert report.kernels["quant_gemm"].spill_bytes <= 40
    assert not report.serialized_wgmma


class Bench:
    """Everything one product needs."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self.device = device
        self.packer = Packer(device, compiler)
        self.activations = ActivationKernels(device, compiler)
        self.gemm = GemmKernels(device, compiler)

    def chunks(self, x: np.ndarray) -> DeviceArray:  # type: ignore[type-arg]
        operand = self.activations.operand(*x.shape)
        self.activations.convert(self.device.to_device(x), operand, CHUNKS)
        return operand


@pytest.fixture(scope="module", params=["own", "portable"])
def bench(device: Device, compiler: Compiler, request: pytest.FixtureRequest) -> Bench:
    if request.param == "own":
        return Bench(device, compiler)
    if device.arch != "sm_90a":
        pytest.skip("the portable code is the card's own")
    return Bench(device, Compiler("sm_90", None))


def matrix(format: str, rows: int, columns: int, seed: int) -> tuple[RawMatrix, np.ndarray]:  # type: ignore[type-arg]
    data = random_matrix(format, rows, columns, np.random.default_rng(seed))
    values = file_values(format, data).astype(np.float64)
    return RawMatrix(format, rows, columns, data.reshape(-1)), values


@pytest.mark.gpu
@pytest.mark.parametrize("format", sorted(BLOCK_BYTES))
def test_each_format_against_float64(bench: Bench, format: str) -> None:
    part, values = matrix(format, 328, 1280, 3)
    plan = bench.gemm.plan(bench.packer.pack([part]))
    x = np.random.default_rng(4).normal(size=(333, 1280)).astype(np.float32)
    out = bench.device.allocate((333, 328), np.float32)
    bench.device.fill(out, 0xFF)
    bench.gemm.multiply(plan, bench.chunks(x), 333, out, STORE)
    got = bench.device.to_host(out)
    assert relative_error(got, x.astype(np.float64) @ values.T) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(
    "formats",
    [
        (("Q5_K", 256), ("F32", 72)),
        (("Q5_K", 65), ("Q5_K", 130)),
        (("F32", 65), ("BF16", 64)),
        (("F32", 1),),
    ],
)
def test_rows_of_fp16_are_the_float32_ones_rounded(
    bench: Bench, formats: tuple[tuple[str, int], ...]
) -> None:
    parts = [matrix(format, count, 512, 3 + count)[0] for format, count in formats]
    num_rows = sum(part.rows for part in parts)
    plan = bench.gemm.plan(bench.packer.pack(parts))
    operand = bench.chunks(np.random.default_rng(4).normal(0, 1e5, (75, 512)).astype(np.float32))
    results = []
    for dtype in (ElementType.F32, ElementType.F16):
        out = bench.device.allocate((75, num_rows), dtype)
        bench.device.fill(out, 0xFF)
        bench.gemm.multiply(plan, operand, 75, out, STORE)
        results.append(bench.device.to_host(out))
    full, half = results
    assert np.abs(full).max() > 65504
    np.testing.assert_array_equal(half, np.clip(full, -65504, 65504).astype(np.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["BF16", "F32"])
def test_floats_of_any_magnitude_are_multiplied_as_they_are(bench: Bench, format: str) -> None:
    rng = np.random.default_rng(12)
    data = float_matrix(format, of_any_magnitude(200, 1280, rng))
    plan = bench.gemm.plan(bench.packer.pack([RawMatrix(format, 200, 1280, data.reshape(-1))]))
    x = rng.integers(-8, 9, (100, 1280)).astype(np.float32)
    out = bench.device.allocate((100, 200), np.float32)
    bench.gemm.multiply(plan, bench.chunks(x), 100, out, STORE)
    assert_exact(bench.device.to_host(out), x, format, data)


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_cut_or_the_tile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = (("Q6_K", 256), ("BF16", 64), ("F32", 48), ("Q4_K", 80))
    parts = [matrix(format, rows, 2048, rows)[0] for format, rows in formats]
    plan = bench.gemm.plan(bench.packer.pack(parts))
    x = np.random.default_rng(7).normal(size=(576, 2048)).astype(np.float32)
    results = []
    for columns, cut in [(64, 576), (128, 576), (256, 576), (128, 64), (64, 192)]:
        if columns not in bench.gemm._kernels.widths:
            continue
        monkeypatch.setattr(bench.gemm, "_tile_columns", lambda *_, columns=columns: columns)
        rows = []
        for start in range(0, 576, cut):
            piece = np.ascontiguousarray(x[start : start + cut])
            out = bench.device.allocate((len(piece), 448), np.float32)
            bench.gemm.multiply(plan, bench.chunks(piece), len(piece), out, STORE)
            rows.append(bench.device.to_host(out))
        results.append(np.concatenate(rows))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.gpu
def test_swiglu_then_down_with_residual(bench: Bench) -> None:
    gate, gate_values = matrix("Q5_K", 768, 512, 8)
    up, up_values = matrix("Q5_K", 768, 512, 9)
    down, down_values = matrix("Q6_K", 512, 768, 10)
    first = bench.gemm.plan(bench.packer.pack_paired(gate, up))
    second = bench.gemm.plan(bench.packer.pack([down]))
    rng = np.random.default_rng(11)
    x = rng.normal(size=(101, 512)).astype(np.float32)
    residual = rng.normal(size=(101, 512)).astype(np.float32)
    middle = bench.activations.operand(101, 768)
    out = bench.device.to_device(residual)
    bench.gemm.multiply(first, bench.chunks(x), 101, middle, SWIGLU)
    bench.gemm.multiply(second, middle, 101, out, ADD)
    g, u = x @ gate_values.T, x @ up_values.T
    product = (g / (1 + np.exp(-g)) * u) @ down_values.T
    got = bench.device.to_host(out) - residual
    assert relative_error(got, product) < 2 * TOLERANCE
