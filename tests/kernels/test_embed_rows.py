"""Rows of quantized tables against the `gguf` package's own values, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from daemon.kernels import embed_rows
from daemon.kernels.embed_rows import FORMATS, EmbedRows
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler

if TYPE_CHECKING:
    from daemon.kernels.runtime.device import Device

COLUMNS = 2560


def random_table(name: str, rows: int) -> np.ndarray:
    """Random bytes, with scales that are finite halves."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(len(name))
    table = rng.integers(0, 256, (rows, COLUMNS // block, size), np.uint8)
    scales = rng.normal(size=(rows, COLUMNS // block, size // 2 + 1)).astype(np.float16)
    if name in ("F32", "F16", "BF16"):
        wide = rng.normal(size=(rows, COLUMNS)).astype(np.float32)
        if name == "BF16":
            return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return (wide if name == "F32" else wide.astype(np.float16)).view(np.uint8)
    at = 208 if name == "Q6_K" else 0
    table[..., at : at + 2] = scales[..., :1].view(np.uint8)
    if name in ("Q4_K", "Q5_K"):
        table[..., 2:4] = scales[..., 1:2].view(np.uint8)
    return table.reshape(rows, -1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FORMATS)
def test_compiles_without_spills(arch: str, name: str) -> None:
    report = Compiler(arch, None).report(embed_rows.SOURCE, embed_rows.defines(name))
    assert report.kernels["embed_rows"].spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_embed_rows(device: Device, compiler: Compiler, name: str) -> None:
    table = random_table(name, 7)
    tokens = np.array([6, 0, 3, -1, 3], np.int32)
    output = device.allocate((len(tokens), COLUMNS), np.float32)
    device.fill(output, 0xFF)
    EmbedRows(device, compiler, name)(device.to_device(table), device.to_device(tokens), output)
    values = quants.dequantize(table, GGMLQuantizationType[name]).astype(np.float32)
    want = np.where(tokens[:, None] >= 0, values[tokens], 0)
    np.testing.assert_array_equal(device.to_host(output), want)
