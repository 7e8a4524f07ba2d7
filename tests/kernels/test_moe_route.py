"""Routing of rows to experts against the NumPy reference, and the lists that kernels work from."""

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from daemon.engine.backends import numpy_delta_net, numpy_experts
from daemon.kernels import moe_route
from daemon.kernels.moe_route import MoeRoute, MoeSizes, RouteLists, RowLines
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device import Device

EPS = 1e-6
SIZES = [
    MoeSizes(256, 8, 2048, True),
    MoeSizes(512, 10, 4096, True),
    MoeSizes(128, 8, 1280, False),
    MoeSizes(3, 1, 256, True),
    MoeSizes(40, 40 - 8, 512, False),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    compiler, sizes = Compiler(arch, None), SIZES[1]
    report = compiler.report(moe_route.SOURCE, moe_route.defines(sizes))
    assert all(resources.spill_bytes == 0 for resources in report.kernels.values())
    for tile in moe_route.SCORE_TILES:
        defines = moe_route.score_defines(sizes, tile)
        report = compiler.report(moe_route.SCORES_SOURCE, defines)
        assert report.kernels["moe_scores"].spill_bytes == 0


class Rows:
    """Random rows and router, and what the reference makes of them."""

    def __init__(self, sizes: MoeSizes, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        columns, experts = sizes.columns, sizes.num_experts
        self.x = rng.normal(0, 3, (count, columns)).astype(np.float32)
        self.norm = rng.normal(1, 0.2, columns).astype(np.float32)
        self.router = rng.normal(0, columns**-0.5, (sizes.num_scores, columns)).astype(np.float32)
        self.router[experts - 1] = self.router[0]  # tied: the lower index wins
        normed = numpy_delta_net.rms_norm(self.x.astype(np.float64), self.norm, EPS)  # type: ignore[arg-type]
        scores = normed @ self.router.T.astype(np.float64)
        self.normed = normed
        self.chosen, self.weights = numpy_experts.route(scores[:, :experts], sizes.num_used)
        self.gates = numpy_delta_net.sigmoid(scores[:, experts:])

    def check_weights(self, got: np.ndarray) -> None:  # type: ignore[type-arg]
        used = self.chosen.shape[1]
        np.testing.assert_allclose(got[:, :used], self.weights, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_few_rows(device: Device, compiler: Compiler, sizes: MoeSizes, count: int) -> None:
    rows = Rows(sizes, count)
    route = MoeRoute(device, compiler, sizes, 1)
    lists = RouteLists.allocate(device, sizes)
    panels = device.allocate((16, sizes.columns), np.float16)
    constants = [device.to_device(array) for array in (rows.norm, rows.router)]
    # Twice: the first run must leave its counter as it was.
    for _ in range(2):
        route.few(device.to_device(rows.x), *constants, panels, lists, EPS)
    experts, ranks, weights = (device.to_host(array) for array in lists)
    rows.check_weights(weights[:count])
    if sizes.has_shared:
        np.testing.assert_allclose(weights[:count, -1:], rows.gates, rtol=1e-4)
    listed = experts[1 : 1 + experts[0]]
    assert sorted(listed) == sorted(set(rows.chosen.reshape(-1)))
    assert (ranks[0] == sizes.num_used).all()
    for slot, expert in enumerate(listed, 1):
        for row in range(16):
            chosen = rows.chosen[row].tolist() if row < count else []
            expected = chosen.index(expert) if expert in chosen else 255
            assert ranks[slot, row] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("count", [1, 77, 1000])
def test_many_rows(device: Device, compiler: Compiler, sizes: MoeSizes, count: int) -> None:
    rows = Rows(sizes, count)
    route = MoeRoute(device, compiler, sizes, count)
    lines = RowLines.allocate(device, sizes, count)
    constants = [device.to_device(array) for array in (rows.norm, rows.router)]
    route.many(device.to_device(rows.x), *constants, lines, EPS)
    chosen, weights, first, places = (device.to_host(array) for array in lines)
    assert (chosen == rows.chosen).mean() > 0.9999  # float32 may exchange scores that are equal
    rows.check_weights(weights)
    pairs = chosen.reshape(-1)
    counts = np.bincount(pairs, minlength=sizes.num_experts)
    np.testing.assert_array_equal(first[:-1], np.concatenate([[0], counts.cumsum()]))
    assert first[-1] == count * (sizes.num_used + sizes.has_shared)
    line = np.empty_like(pairs)
    line[np.argsort(pairs, kind="stable")] = np.arange(len(pairs))
    expected = line * 8 + (line - first[pairs]) % 8
    np.testing.assert_array_equal(places.reshape(-1), expected)


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_batch(
    device: Device, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SIZES[0]
    rows = Rows(sizes, 300)
    route = MoeRoute(device, compiler, sizes, 300)
    constants = [device.to_device(array) for array in (rows.norm, rows.router)]
    results = []
    for tile, cut in ((64, 300), (32, 300), (64, 100), (32, 60)):
        monkeypatch.setattr(route, "_score_tile", lambda _, tile=tile: tile)
        weights = []
        for start in range(0, 300, cut):
            lines = RowLines.allocate(device, sizes, cut)
            route.many(device.to_device(rows.x[start : start + cut]), *constants, lines, EPS)
            weights.append(device.to_host(lines.weights)[:, :-1])
        results.append(np.concatenate(weights))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.gpu
def test_broken_rows_choose_experts_that_exist(device: Device, compiler: Compiler) -> None:
    sizes = SIZES[0]
    rows = Rows(sizes, 2)
    rows.x[0] = np.nan
    route = MoeRoute(device, compiler, sizes, 2)
    lists, lines = RouteLists.allocate(device, sizes), RowLines.allocate(device, sizes, 2)
    x, *constants = (device.to_device(array) for array in (rows.x, rows.norm, rows.router))
    panels = device.allocate((16, sizes.columns), np.float16)
    route.few(x, *constants, panels, lists, EPS)
    route.many(x, *constants, lines, EPS)
    experts = device.to_host(lists.experts)
    assert set(experts[1 : 1 + experts[0]]) == set(range(8)) | set(rows.chosen[1])
    np.testing.assert_array_equal(device.to_host(lines.chosen)[0], np.arange(8))
