"""A few rows times quantized matrices: right, and the same bits whoever else is in the batch."""

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

from daemon.kernels import quant_activations, quant_gemv
from daemon.kernels.quant_activations import PANELS, ActivationKernels
from daemon.kernels.quant_gemv import ADD, STORE, SWIGLU, GemvKernels, choose_shape, deal
from daemon.kernels.quant_pack import (
    F16,
    F32,
    Q4_K,
    Q6_K,
    PackedMatrix,
    Packer,
    QuantType,
    RawMatrix,
    Segment,
)
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.weight_ring import STATIC_SHARED_BYTES

TOLERANCE = 1e-3
"""Of the norm: weights and activations are rounded to fp16, sums are float32."""


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def fake_matrix(columns: int, parts: list[tuple[QuantType, int]]) -> PackedMatrix:
    segments, row = [], 0
    for kind, rows in parts:
        shape = (-(-rows // kind.stripe_rows), columns // 256, 4, kind.tile_bytes)
        tiles = DeviceArray(2**20 * (len(segments) + 1), shape, ElementType.U8, None)
        segments.append(Segment(kind, row, rows, tiles))
        row += rows
    return PackedMatrix(row, columns, tuple(segments), False)


def stripe_rows(matrix: PackedMatrix) -> list[int]:
    """Where each stripe begins."""
    return [
        row
        for kind, first_row, rows, _ in matrix.segments
        for row in range(first_row, first_row + rows, kind.stripe_rows)
    ]


@pytest.mark.parametrize("num_blocks", [1, 7, 132])
@pytest.mark.parametrize("num_teams", [2, 4])
@pytest.mark.parametrize("columns", [256, 1536, 17408])
def test_every_unit_is_dealt_once_in_equal_shares(
    num_blocks: int, num_teams: int, columns: int
) -> None:
    matrix = fake_matrix(columns, [(Q4_K, 1000), (Q6_K, 330), (F16, 20), (F32, 40)])
    dealt = deal(matrix, num_blocks, num_teams)
    pieces = dealt.pieces[dealt.pieces["num_units"] > 0]
    units = [
        (row, first + i)
        for row, first, n in zip(
            pieces["row"], pieces["first_block"], pieces["num_units"], strict=True
        )
        for i in range(n)
    ]
    stripes = stripe_rows(matrix)
    assert units == [(row, block) for row in stripes for block in range(columns // 256)]
    share = (dealt.pieces["num_units"] * dealt.pieces["tile_bytes"]).sum(2)
    assert share.sum(1).max() - share.sum(1).mean() <= F16.tile_bytes
    assert (share.max(1) - share.mean(1)).max() <= F16.tile_bytes
    assert (dealt.pieces["num_units"][..., -1] == 0).all()
    assert (dealt.seams["num_sums"][:, -1] == 0).all()


def test_pieces_point_into_their_own_segment() -> None:
    matrix = fake_matrix(1536, [(Q4_K, 1000), (Q6_K, 330), (F16, 20)])
    [first, second, third] = matrix.segments
    pieces = deal(matrix, 7, 4).pieces
    for piece in pieces[pieces["num_units"] > 0]:
        segment = next(s for s in (third, second, first) if piece["row"] >= s.first_row)
        stripe = (piece["row"] - segment.first_row) // 64
        unit = stripe * 1536 // 256 + piece["first_block"]
        assert piece["units"] == segment.tiles.pointer + unit * 4 * segment.kind.tile_bytes


@pytest.mark.parametrize("num_blocks", [1, 7, 132])
@pytest.mark.parametrize("columns", [256, 1536, 17408])
def test_every_cut_stripe_is_joined_once_in_order(num_blocks: int, columns: int) -> None:
    matrix = fake_matrix(columns, [(Q4_K, 1000), (Q6_K, 330), (F16, 20), (F32, 40)])
    dealt = deal(matrix, num_blocks, 4)
    written: dict[int, int] = {}
    finished: list[int] = []
    for block, (teams, seams) in enumerate(zip(dealt.pieces, dealt.seams, strict=True)):
        pieces = teams[teams["num_units"] > 0]
        cut = pieces[pieces["sums"] >= 0]
        assert list(cut["sums"]) == list(range(len(cut)))
        assert len(cut) <= 8
        finished += pieces["row"][pieces["sums"] < 0].tolist()
        joined = 0
        for seam in seams[seams["num_sums"] > 0]:
            own = cut[seam["first_sums"] : seam["first_sums"] + seam["num_sums"]]
            assert set(own["row"]) == {seam["row"]}
            joined += len(own)
            before = range(seam["first_slot"], seam["first_slot"] + seam["num_before"])
            assert all(written[slot] == seam["row"] for slot in before)
            if seam["own_slot"] < 0:
                finished.append(int(seam["row"]))
            else:
                assert seam["own_slot"] == before.stop
                written[int(seam["own_slot"])] = int(seam["row"])
        assert joined == len(cut), block
    assert sorted(written) == list(range(dealt.num_slots))
    assert sorted(finished) == stripe_rows(matrix)


@pytest.mark.parametrize("limit", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("kind", [Q4_K, Q6_K, F16, F32], ids=["q4_k", "q6_k", "f16", "f32"])
def test_a_block_fits_the_shared_memory_of_every_card(limit: int, kind: QuantType) -> None:
    shape = choose_shape(limit)
    head = deal(fake_matrix(2048, [(kind, 248_320)]), 82, shape.teams)
    slots = max(1, shape.ring_bytes // (shape.warps * kind.tile_bytes))
    needed = quant_gemv.shared_bytes(shape, slots, kind.tile_bytes, 2, head.pieces.shape[2])
    assert needed + STATIC_SHARED_BYTES <= limit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_with_few_spills(arch: str) -> None:
    shape = choose_shape(227 * 1024 if arch == "sm_90a" else 99 * 1024)
    for num_panels, types, slot in ((1, 7, 3360), (2, 255, 8256)):
        defines = quant_gemv.defines(shape, types, num_panels, 2, slot, ADD, arch)
        report = Compiler(arch, None).report(quant_gemv.SOURCE, defines)
        assert report.kernels["quant_gemv"].spill_bytes <= 96


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_activations_compile(arch: str) -> None:
    for kind in quant_activations.KINDS:
        for layout, columns in ((0, 5120), (1, 5120), (1, 17408)):
            defines = quant_activations.defines(kind, layout, columns)
            report = Compiler(arch, None).report(quant_activations.SOURCE, defines)
            assert report.kernels["quant_activations"].spill_bytes == 0


class Bench:
    """Everything one product needs."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self.device = device
        self.packer = Packer(device, compiler)
        self.activations = ActivationKernels(device, compiler)
        self.gemv = GemvKernels(device, compiler)

    def panels(self, x: np.ndarray) -> DeviceArray:  # type: ignore[type-arg]
        operand = self.activations.operand(*x.shape)
        self.activations.convert(self.device.to_device(x), operand, PANELS)
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
    part, values = matrix(format, 1000, 2560, 3)
    plan = bench.gemv.plan(bench.packer.pack([part]))
    x = np.random.default_rng(4).normal(size=(16, 2560)).astype(np.float32)
    panels = bench.panels(x)
    results = []
    for num_tokens in (16, 9, 8, 3, 1):
        out = bench.device.allocate((num_tokens, 1000), np.float32)
        bench.device.fill(out, 0xFF)
        bench.gemv.multiply(plan, panels, num_tokens, out, STORE)
        results.append(bench.device.to_host(out))
    assert relative_error(results[0], x.astype(np.float64) @ values.T) < TOLERANCE
    for fewer in results[1:]:
        np.testing.assert_array_equal(fewer, results[0][: len(fewer)])


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["BF16", "F32"])
def test_floats_of_any_magnitude_are_multiplied_as_they_are(bench: Bench, format: str) -> None:
    rng = np.random.default_rng(12)
    data = float_matrix(format, of_any_magnitude(200, 1280, rng))
    plan = bench.gemv.plan(bench.packer.pack([RawMatrix(format, 200, 1280, data.reshape(-1))]))
    x = rng.integers(-8, 9, (16, 1280)).astype(np.float32)
    out = bench.device.allocate((16, 200), np.float32)
    bench.gemv.multiply(plan, bench.panels(x), 16, out, STORE)
    assert_exact(bench.device.to_host(out), x, format, data)


@pytest.mark.gpu
def test_a_group_of_formats_adds_to_the_residual(bench: Bench) -> None:
    formats = [("Q5_K", 640), ("Q4_K", 384), ("Q8_0", 48), ("F32", 48), ("IQ4_XS", 200)]
    pairs = [matrix(f, rows, 1024, seed) for seed, (f, rows) in enumerate(formats)]
    plan = bench.gemv.plan(bench.packer.pack([part for part, _ in pairs]))
    values = np.concatenate([v for _, v in pairs])
    rng = np.random.default_rng(5)
    x = rng.normal(size=(5, 1024)).astype(np.float32)
    residual = rng.normal(size=(5, len(values))).astype(np.float32)
    out = bench.device.to_device(residual)
    bench.gemv.multiply(plan, bench.panels(x), 5, out, ADD)
    expected = residual + x.astype(np.float64) @ values.T
    assert relative_error(bench.device.to_host(out), expected) < TOLERANCE


@pytest.mark.gpu
def test_swiglu_feeds_the_next_product(bench: Bench) -> None:
    gate, gate_values = matrix("Q4_K", 768, 512, 6)
    up, up_values = matrix("Q4_K", 768, 512, 7)
    down, down_values = matrix("Q6_K", 512, 768, 8)
    first = bench.gemv.plan(bench.packer.pack_paired(gate, up))
    second = bench.gemv.plan(bench.packer.pack([down]))
    x = np.random.default_rng(9).normal(size=(11, 512)).astype(np.float32)
    middle = bench.activations.operand(11, 768)
    out = bench.device.allocate((11, 512), np.float32)
    bench.gemv.multiply(first, bench.panels(x), 11, middle, SWIGLU)
    bench.gemv.multiply(second, middle, 11, out, STORE)
    g, u = x @ gate_values.T, x @ up_values.T
    expected = (g / (1 + np.exp(-g)) * u) @ down_values.T
    assert relative_error(bench.device.to_host(out), expected) < 2 * TOLERANCE


@pytest.mark.gpu
def test_norm_in_front(bench: Bench) -> None:
    part, values = matrix("Q8_0", 64, 5120, 10)
    rng = np.random.default_rng(11)
    x = rng.normal(size=(2, 5120)).astype(np.float32) * 50
    weight = rng.normal(size=5120).astype(np.float32)
    device = bench.device
    panels = bench.activations.operand(2, 5120)
    out = device.allocate((2, 64), np.float32)
    norm = device.to_device(weight)
    bench.activations.convert(device.to_device(x), panels, PANELS, norm, 1e-6)
    bench.gemv.multiply(bench.gemv.plan(bench.packer.pack([part])), panels, 2, out, STORE)
    scale = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    assert relative_error(device.to_host(out), x / scale * weight @ values.T) < TOLERANCE
