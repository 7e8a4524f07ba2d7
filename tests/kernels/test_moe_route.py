"""Routing of rows to experts against the NumPy reference, and the grouping of rows by expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from daemon.engine.backends import numpy_experts
from daemon.kernels import moe_route
from daemon.kernels.moe_route import MoeRoute
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler

if TYPE_CHECKING:
    from daemon.kernels.runtime.device import Device


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    report = Compiler(arch, None).report(moe_route.SOURCE, moe_route.defines(512, 10))
    assert all(resources.spill_bytes == 0 for resources in report.kernels.values())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("experts", "used"), [(256, 8), (512, 10), (32, 1)])
def test_route_and_group(
    device: Device, compiler: Compiler, rows: int, experts: int, used: int
) -> None:
    rng = np.random.default_rng(rows + experts)
    scores = rng.normal(0, 2, (rows, experts)).astype(np.float32)
    scores[0] = 1  # all tied
    chosen = device.allocate((rows, used), np.int32)
    weights = device.allocate((rows, used), np.float32)
    first = device.allocate((experts + 1,), np.int32)
    pairs = device.allocate((rows * used,), np.int32)
    kernels = MoeRoute(device, compiler, experts, used)
    kernels.route(device.to_device(scores), chosen, weights)
    kernels.group(chosen, first, pairs)
    want_chosen, want_weights = numpy_experts.route(scores, used)
    got = device.to_host(chosen)
    np.testing.assert_array_equal(got, want_chosen)
    np.testing.assert_allclose(device.to_host(weights), want_weights, rtol=1e-5)
    order = np.argsort(got.reshape(-1), kind="stable")
    np.testing.assert_array_equal(device.to_host(pairs), order)
    counts = np.bincount(got.reshape(-1), minlength=experts)
    np.testing.assert_array_equal(device.to_host(first), np.concatenate([[0], counts.cumsum()]))
