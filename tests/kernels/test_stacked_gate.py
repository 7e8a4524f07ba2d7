"""A gate and an up matrix of different formats: stacked products, then joined by a kernel."""

import numpy as np
import pytest
from quant_reference import file_values, random_matrix

pytest.importorskip("cuda.core")

from daemon.kernels.quant_activations import CHUNKS, PANELS, ActivationKernels
from daemon.kernels.quant_gemm import GemmKernels
from daemon.kernels.quant_gemv import STORE, GemvKernels
from daemon.kernels.quant_pack import Packer, RawMatrix
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device

pytestmark = pytest.mark.gpu

HIDDEN, WIDTH = 512, 768
TOLERANCE = 2e-3
"""Of the largest output, for two products of fp16 operands one after the other."""


def matrix(format: str, rows: int, columns: int, seed: int) -> tuple[RawMatrix, np.ndarray]:  # type: ignore[type-arg]
    data = random_matrix(format, rows, columns, np.random.default_rng(seed))
    return RawMatrix(format, rows, columns, data.reshape(-1)), file_values(format, data)


@pytest.mark.parametrize(("num_tokens", "layout"), [(1, PANELS), (11, PANELS), (101, CHUNKS)])
def test_stacked_products_are_gated_and_feed_the_next(
    device: Device, compiler: Compiler, num_tokens: int, layout: int
) -> None:
    gate, gate_values = matrix("Q4_K", WIDTH, HIDDEN, 1)
    up, up_values = matrix("Q6_K", WIDTH, HIDDEN, 2)
    down, down_values = matrix("Q5_K", HIDDEN, WIDTH, 3)
    packer, kernels = Packer(device, compiler), ActivationKernels(device, compiler)
    few = layout == PANELS
    products = GemvKernels(device, compiler) if few else GemmKernels(device, compiler)
    both, last = (products.plan(packer.pack(parts)) for parts in ([gate, up], [down]))
    x = np.random.default_rng(4).normal(size=(num_tokens, HIDDEN)).astype(np.float32)
    operand, middle = (kernels.operand(num_tokens, columns) for columns in (HIDDEN, WIDTH))
    stacked = device.allocate((num_tokens, 2 * WIDTH), np.float32)
    out = device.allocate((num_tokens, HIDDEN), np.float32)
    kernels.convert(device.to_device(x), operand, layout)
    products.multiply(both, operand, num_tokens, stacked, STORE)  # type: ignore[arg-type]
    kernels.gate(stacked, middle, layout)
    products.multiply(last, middle, num_tokens, out, STORE)  # type: ignore[arg-type]
    g, u = x @ gate_values.T, x @ up_values.T
    expected = (g / (1 + np.exp(-g)) * u) @ down_values.T
    error = np.abs(device.to_host(out) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE
