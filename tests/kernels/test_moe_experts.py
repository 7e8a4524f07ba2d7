"""Experts of a few rows and of a prompt: right, and the same bits whoever else is in the batch."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from quant_reference import file_values, random_matrix

pytest.importorskip("cuda.core")

from daemon.engine.backends import numpy_delta_net, numpy_experts
from daemon.errors import UnsupportedModel
from daemon.kernels import gemm_tiles, moe_decode, moe_prefill
from daemon.kernels.moe_decode import Team, choose_team
from daemon.kernels.moe_pack import (
    GATE,
    ExpertMatrix,
    GatedExperts,
    RawExperts,
    gate_up_steps,
    pack_experts,
    pack_gated,
    pack_stacked,
)
from daemon.kernels.moe_route import MoeRoute, MoeSizes, RouteLists, RowLines
from daemon.kernels.quant_gemv import STORE, SWIGLU
from daemon.kernels.quant_pack import F16, F32, Q4_K, Q6_K, Packer, QuantType, RawMatrix
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler, Cubin
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.paper_device import Card, PaperCompiler, PaperDevice

Array = np.ndarray  # type: ignore[type-arg]
EPS = 1e-6
TOLERANCE = 2e-3
"""Of the norm, through two products: weights and operands are rounded to fp16, sums are float32."""


def test_a_team_has_a_warp_for_each_block_of_k() -> None:
    assert choose_team(8, 16) == Team(8, 2, 1)
    assert choose_team(1, 16) == Team(1, 16, 1)
    assert choose_team(12, 16) == Team(12, 1, 1)
    assert choose_team(20, 16) == Team(10, 1, 2)
    assert choose_team(12, 8) == Team(6, 1, 2)


class Macros(PaperCompiler):
    """Notes what kernels are asked for."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.asked: list[Mapping[str, str | int]] = []

    def cubin(self, source: Path, defines: Mapping[str, str | int] | None = None) -> Cubin:
        self.asked.append(defines or {})
        return super().cubin(source, defines)


@pytest.mark.parametrize("kind", [Q4_K, Q6_K, F16, F32], ids=["q4_k", "q6_k", "f16", "f32"])
@pytest.mark.parametrize("limit", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize(
    ("sizes", "width"),
    [(MoeSizes(256, 8, 2048, True), 512), (MoeSizes(512, 10, 4096, True), 1024)],
    ids=["35b-a3b", "397b-a17b"],
)
def test_decode_has_a_ring_on_every_card(
    sizes: MoeSizes, width: int, limit: int, kind: QuantType
) -> None:
    card, compiler = PaperDevice(Card("a card", "sm_86", 84, limit)), Macros("sm_86")
    kernels = moe_decode.MoeDecode(card, compiler, sizes, width)
    lists = RouteLists.allocate(card, sizes)
    nowhere = card.allocate((1,), np.uint8)
    gate_up = ExpertMatrix(kind, nowhere, sizes.num_experts, width, sizes.columns)
    down = ExpertMatrix(kind, nowhere, sizes.num_experts, sizes.columns, width)
    for rows in (1, 16):
        residual = card.allocate((rows, sizes.columns), np.float32)
        gated = GatedExperts((gate_up, gate_up), width)
        kernels.gate_up(gated, gated, nowhere, lists, rows)
        kernels.down(down, down, lists, residual)
    assert all(int(macros["SLOTS"]) > 0 for macros in compiler.asked)


def test_what_lies_apart_takes_two_launches() -> None:
    one, two = object(), object()
    paired, apart = GatedExperts((one,), 64), GatedExperts((one, two), 64)  # type: ignore[arg-type]
    assert gate_up_steps(paired, paired) == [(SWIGLU, one, one)]
    assert gate_up_steps(paired, None) == [(SWIGLU, one, None)]
    assert gate_up_steps(apart, apart) == [(STORE, two, two), (GATE, one, one)]
    assert gate_up_steps(apart, paired) == [
        (SWIGLU, None, one), (STORE, two, None), (GATE, one, None),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("types", "panels", "slot"), [(72, 1, 8256), (200, 2, 8256), (5, 2, 3360)])
def test_decode_compiles_with_few_spills(arch: str, types: int, panels: int, slot: int) -> None:
    warps = 8 if arch in ("sm_86", "sm_89") else 16
    compiler = Compiler(arch, None)
    team = choose_team(8, warps)
    for epilogue in (SWIGLU, GATE) if panels == 1 else (SWIGLU,):
        defines = moe_decode.gate_up_defines(types, panels, 3, slot, team, epilogue, arch)
        report = compiler.report(moe_decode.GATE_UP_SOURCE, defines)
        assert report.kernels["moe_gate_up"].spill_bytes <= 32
    defines = moe_decode.down_defines(types, panels, 3, slot, 2, warps, 8, arch)
    report = compiler.report(moe_decode.DOWN_SOURCE, defines)
    assert report.kernels["moe_down"].spill_bytes <= 32


PRODUCTS = [(arch, *product) for arch in ARCHITECTURES for product in ((STORE, 64), (SWIGLU, 256))]


@pytest.mark.parametrize(
    ("arch", "epilogue", "columns"), [*PRODUCTS, ("sm_80", GATE, 128), ("sm_90a", GATE, 128)]
)
def test_prefill_compiles_with_few_spills_and_no_serialized_products(
    arch: str, epilogue: int, columns: int
) -> None:
    columns = columns if arch == "sm_90a" else min(columns, 128)
    compiler = Compiler(arch, None)
    defines = gemm_tiles.defines(5, columns, 13440, epilogue, 3) | {"EXPERTS": 256}
    report = compiler.report(moe_prefill.GEMM_SOURCE, defines)
    assert report.kernels["moe_gemm"].spill_bytes <= 32
    assert not report.serialized_wgmma
    rows = moe_prefill.rows_defines(MoeSizes(256, 8, 2048, True))
    report = compiler.report(moe_prefill.ROWS_SOURCE, rows)
    assert all(kernel.spill_bytes == 0 for kernel in report.kernels.values())


@pytest.mark.parametrize("epilogue", [STORE, SWIGLU, GATE])
def test_wide_tiles_are_left_out_where_their_rings_do_not_fit(epilogue: int) -> None:
    card = PaperDevice(Card("a card", "sm_86", 84, 99 * 1024))
    kernels = moe_prefill.MoePrefill(
        card, PaperCompiler("sm_86"), MoeSizes(256, 8, 512, True), 256, 2048
    )
    for kind, columns in ((Q4_K, 128), (F16, 64)):
        unit_bytes = 4 * kind.tile_bytes
        assert kernels._tile_columns(16384, epilogue, unit_bytes) == columns
        assert kernels._products.fits(columns, unit_bytes)


Formats = tuple[str, str, str]
Rows = Array | Sequence[int]
ROWS = 333
BROKEN = ROWS
"""A row that is no number."""


class Experts:
    """Random experts: on the device, and their values `[experts, rows, columns]`, float32."""

    def __init__(
        self,
        packer: Packer,
        sizes: tuple[int, int, int],
        formats: Formats,
        rng: np.random.Generator,
    ) -> None:
        count, width, hidden = sizes
        gate, gate_values = self._draw(formats[0], (count, width, hidden), rng)
        up, up_values = self._draw(formats[1], (count, width, hidden), rng)
        down, self.down_values = self._draw(formats[2], (count, hidden, width), rng)
        self.gate_up = pack_gated(packer, gate, up)
        self.down = pack_experts(packer, down)
        self.gate_up_values = np.concatenate([gate_values, up_values], 1)

    @staticmethod
    def _draw(
        format: str, shape: tuple[int, int, int], rng: np.random.Generator
    ) -> tuple[RawExperts, Array]:
        count, rows, columns = shape
        data = random_matrix(format, count * rows, columns, rng)
        raw = RawMatrix(format, count * rows, columns, data.reshape(-1))
        return RawExperts(count, raw), file_values(format, data).reshape(shape)


def routed(x: Array, gate_up: Array, down: Array, chosen: Array, weights: Array) -> Array:
    """numpy_experts.routed with one product an expert, matrices as files have them."""
    total = np.zeros_like(x)
    for expert in np.unique(chosen):
        rows, ranks = np.nonzero(chosen == expert)
        hidden = numpy_experts.swiglu(x[rows] @ gate_up[expert].T)
        total[rows] += weights[rows, ranks, None] * (hidden @ down[expert].T)
    return total


def test_the_reference_of_these_tests_is_the_twin() -> None:
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((9, 64), (6, 2 * 32, 64), (6, 64, 32))
    )
    chosen, weights = numpy_experts.route(rng.normal(size=(9, 6)).astype(np.float32), 3)
    swapped = [matrix.transpose(0, 2, 1) for matrix in (gate_up, down)]
    expected = numpy_experts.routed(x, *swapped, chosen, weights)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        routed(x, gate_up, down, chosen, weights), expected, rtol=1e-4, atol=1e-3
    )


class Layer:
    """A layer of experts with everything that runs it, ROWS rows, and one more that is broken."""

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        sizes: MoeSizes,
        widths: tuple[int, int],
        formats: tuple[Formats, Formats],
    ) -> None:
        rng = np.random.default_rng(sizes.columns + sizes.num_experts)
        packer, hidden = Packer(device, compiler), sizes.columns
        self.device, self.sizes, self.arch = device, sizes, compiler.arch
        self.routed = Experts(packer, (sizes.num_experts, widths[0], hidden), formats[0], rng)
        self.shared = None
        if sizes.has_shared:
            self.shared = Experts(packer, (1, widths[1], hidden), formats[1], rng)
        self.norm = rng.normal(1, 0.2, hidden).astype(np.float32)
        self.router = rng.normal(0, hidden**-0.5, (sizes.num_scores, hidden)).astype(np.float32)
        self.x = rng.normal(size=(ROWS + 1, hidden)).astype(np.float32)
        self.x[BROKEN] = np.nan
        self.constants = [device.to_device(array) for array in (self.norm, self.router)]
        self.route = MoeRoute(device, compiler, sizes, ROWS + 1)
        self.decode = moe_decode.MoeDecode(device, compiler, sizes, max(widths))
        self.prefill = moe_prefill.MoePrefill(device, compiler, sizes, max(widths), ROWS + 1)

    @cached_property
    def expected(self) -> Array:
        """What is added to the residual of the rows that are not broken."""
        x = numpy_delta_net.rms_norm(self.x[:ROWS], self.norm, EPS)
        scores = x @ self.router.T
        experts = self.sizes.num_experts
        chosen, weights = numpy_experts.route(scores[:, :experts], self.sizes.num_used)
        mixed = routed(x, self.routed.gate_up_values, self.routed.down_values, chosen, weights)
        if self.shared is not None:
            matrices = (self.shared.gate_up_values[0].T, self.shared.down_values[0].T)
            mixed += numpy_experts.shared(x, scores[:, experts:], *matrices)
        return mixed

    def few(self, rows: Rows) -> Array:
        """The residual of these rows after the kernels of decode."""
        device = self.device
        residual = device.to_device(self.x[rows])
        lists = RouteLists.allocate(device, self.sizes)
        panels = device.allocate((16, self.sizes.columns), np.float16)
        self.route.few(residual, *self.constants, panels, lists, EPS)
        shared_gate_up = self.shared.gate_up if self.shared else None
        shared_down = self.shared.down if self.shared else None
        self.decode.gate_up(self.routed.gate_up, shared_gate_up, panels, lists, len(rows))
        self.decode.down(self.routed.down, shared_down, lists, residual)
        return device.to_host(residual)

    def many(self, rows: Rows) -> Array:
        """The residual of these rows after the kernels of prefill."""
        residual = self.device.to_device(self.x[rows])
        lines = RowLines.allocate(self.device, self.sizes, len(rows))
        norm, router = self.constants
        self.route.many(residual, norm, router, lines, EPS)
        experts = self.sizes.num_experts
        gate = router.rows(experts, experts + 1) if self.shared else None
        self.prefill.mix(
            (self.routed.gate_up, self.shared.gate_up if self.shared else None),
            (self.routed.down, self.shared.down if self.shared else None),
            norm, gate, lines, residual, EPS,
        )  # fmt: skip
        return self.device.to_host(residual)


CASES = {
    "35b-a3b": (
        MoeSizes(32, 8, 2048, True), (512, 512), (("Q4_K", "Q4_K", "Q6_K"), ("Q8_0",) * 3),
    ),
    "one-block": (MoeSizes(16, 4, 256, True), (256, 256), (("Q4_K",) * 3, ("Q4_K",) * 3)),
    "wide-shared": (
        MoeSizes(5, 3, 512, True), (256, 768), (("IQ4_XS",) * 3, ("F16", "F16", "BF16")),
    ),
    "formats-differ": (
        MoeSizes(9, 2, 1280, True), (512, 256), (("Q4_K", "Q5_K", "Q6_K"), ("Q4_0",) * 3),
    ),
    "shared-differs": (
        MoeSizes(9, 2, 512, True), (256, 512), (("Q5_K",) * 3, ("Q8_0", "Q6_K", "F32")),
    ),
    "none-shared": (MoeSizes(7, 1, 768, False), (256, 0), (("BF16", "BF16", "Q4_0"), ("",) * 3)),
    "floats": (MoeSizes(6, 3, 512, True), (256, 256), (("BF16", "BF16", "F32"), ("F32",) * 3)),
    "all-used": (MoeSizes(4, 4, 512, True), (256, 256), (("Q6_K",) * 3, ("Q6_K",) * 3)),
    "large": (
        MoeSizes(12, 10, 4096, True), (1024, 1024), (("Q4_K", "Q4_K", "Q5_K"), ("Q8_0",) * 3),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["own", "portable"])
def code(device: Device, compiler: Compiler, request: pytest.FixtureRequest) -> Compiler:
    if request.param == "own":
        return compiler
    if device.arch != "sm_90a":
        pytest.skip("the portable code is the card's own")
    return Compiler("sm_90", None)


@pytest.fixture(scope="module", params=CASES)
def layer(device: Device, code: Compiler, request: pytest.FixtureRequest) -> Layer:
    return Layer(device, code, *CASES[request.param])


def relative_error(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.gpu
def test_a_few_rows(layer: Layer) -> None:
    most = layer.few(range(16))
    assert relative_error(most - layer.x[:16], layer.expected[:16]) < TOLERANCE
    shuffled = np.random.default_rng(0).permutation(16)
    for rows in (shuffled, shuffled[:9], shuffled[9:], [*range(15, 7, -1)], [6, 6, 2], [6], [0]):
        np.testing.assert_array_equal(layer.few(rows), most[rows])


@pytest.mark.gpu
def test_a_broken_row_breaks_no_other(layer: Layer) -> None:
    for run, count in ((layer.few, 7), (layer.many, 90)):
        whole = run(range(count))
        rows = [*range(3), BROKEN, *range(3, count), BROKEN]
        mixed = run(rows)
        np.testing.assert_array_equal(mixed[np.array(rows) != BROKEN], whole)
        assert np.isnan(mixed[3]).any()


@pytest.mark.gpu
def test_a_prompt(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layer.many(range(ROWS))
    assert relative_error(whole - layer.x[:ROWS], layer.expected) < TOLERANCE
    shuffled = np.random.default_rng(0).permutation(ROWS)
    cuts = [range(start, min(start + 64, ROWS)) for start in range(0, ROWS, 64)]
    picks = [shuffled, shuffled[:100], range(ROWS - 1, -1, -7), [5, 200, 5], [7], *cuts]
    for rows in picks:
        np.testing.assert_array_equal(layer.many(rows), whole[list(rows)])
    for columns in (64, 128, 256) if layer.arch == "sm_90a" else (64, 128):
        monkeypatch.setattr(
            layer.prefill,
            "_tile_columns",
            lambda _, epilogue, __, most=columns: min(most, 128) if epilogue == GATE else most,
        )
        np.testing.assert_array_equal(layer.many(range(ROWS)), whole)
        for rows in cuts:
            np.testing.assert_array_equal(layer.many(rows), whole[list(rows)])


@pytest.mark.gpu
def test_gate_and_up_in_one_tensor(device: Device, compiler: Compiler) -> None:
    count, width, hidden = 5, 96, 512
    data = random_matrix("Q5_K", count * 2 * width, hidden, np.random.default_rng(0))
    stacked = data.reshape(count, 2, width, -1)

    def raw(part: Array) -> RawExperts:
        flat = np.ascontiguousarray(part).reshape(-1)
        return RawExperts(count, RawMatrix("Q5_K", flat.size // data.shape[1], hidden, flat))

    packer = Packer(device, compiler)
    fused = pack_stacked(packer, raw(stacked)).parts[0]
    paired = pack_gated(packer, raw(stacked[:, 0]), raw(stacked[:, 1])).parts[0]
    assert (fused.rows, fused.columns) == (paired.rows, paired.columns) == (2 * width, hidden)
    np.testing.assert_array_equal(device.to_host(fused.tiles), device.to_host(paired.tiles))


@pytest.mark.gpu
def test_float32_gate_and_up_of_one_tensor_lie_apart(device: Device, compiler: Compiler) -> None:
    count, width, hidden = 3, 64, 512
    data = random_matrix("F32", count * 2 * width, hidden, np.random.default_rng(0))
    packer = Packer(device, compiler)
    matrix = RawMatrix("F32", len(data), hidden, data.reshape(-1))
    fused = pack_stacked(packer, RawExperts(count, matrix))
    assert not fused.is_paired
    for part, half in zip(fused.parts, (0, 1), strict=True):
        rows = np.ascontiguousarray(data.reshape(count, 2, width, -1)[:, half]).reshape(-1)
        raw = RawExperts(count, RawMatrix("F32", count * width, hidden, rows))
        alone = pack_experts(packer, raw)
        np.testing.assert_array_equal(device.to_host(part.tiles), device.to_host(alone.tiles))


@pytest.mark.gpu
def test_experts_that_fill_no_stripe_are_refused(device: Device, compiler: Compiler) -> None:
    packer = Packer(device, compiler)
    data = random_matrix("Q8_0", 2 * 48, 256, np.random.default_rng(0)).reshape(-1)
    raw = RawExperts(2, RawMatrix("Q8_0", 96, 256, data))
    with pytest.raises(UnsupportedModel, match="48 rows"):
        pack_experts(packer, raw)
    with pytest.raises(UnsupportedModel, match="24 wide"):
        pack_stacked(packer, raw)


def test_an_expert_matrix_knows_its_stripes() -> None:
    for kind, stripes in ((Q4_K, 16), (F32, 32)):
        matrix = ExpertMatrix(kind, None, 256, 1024, 2048)  # type: ignore[arg-type]
        assert (matrix.stripes, matrix.blocks) == (stripes, 8)
