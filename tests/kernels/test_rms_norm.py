"""RMS norm of rows, alone and with a residual, against NumPy in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from daemon.kernels import rms_norm
from daemon.kernels.rms_norm import RmsNorm
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device_array import ElementType

if TYPE_CHECKING:
    from daemon.kernels.runtime.device import Device

EPS = 1e-6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    for columns in (256, 5120):
        defines = rms_norm.defines(columns, True, ElementType.BF16)
        report = Compiler(arch, None).report(rms_norm.SOURCE, defines)
        assert report.kernels["rms_norm"].spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [256, 1024, 5120, 6148])
@pytest.mark.parametrize("output", [ElementType.F32, ElementType.BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add"])
def test_rms_norm(
    device: Device, compiler: Compiler, columns: int, output: ElementType, add: bool
) -> None:
    rng = np.random.default_rng(columns)
    x, residual = rng.normal(size=(2, 5, columns)).astype(np.float32)
    weight = rng.normal(size=columns).astype(np.float32)
    target = device.allocate((5, columns), output)
    sums = device.to_device(residual)
    RmsNorm(device, compiler, columns, output)(
        device.to_device(x), device.to_device(weight), EPS, target, sums if add else None
    )
    total = x + residual if add else x
    np.testing.assert_array_equal(device.to_host(sums), total if add else residual)
    wide = total.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * weight
    bits = device.to_host(target)
    if output is ElementType.BF16:
        got = (bits.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-30)
    else:
        np.testing.assert_allclose(bits, want, rtol=2e-6)
