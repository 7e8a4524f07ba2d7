"""Conversion to Q8_0 on the host: exact where it can be, within half a step elsewhere."""

import numpy as np
import pytest
from quant_reference import file_values

pytest.importorskip("cuda.core")

import gguf

from daemon.kernels.quant_convert import CONVERTED, MAX_EXPONENT, ROUNDED, as_q8_0

ROWS, COLUMNS = 5, 512


def random_rows(format: str, seed: int = 2) -> np.ndarray:  # type: ignore[type-arg]
    """Any codes, with scales of real weights."""
    values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // values, num_bytes), np.uint8)
    scale = rng.uniform(1e-4, 1e-2, blocks.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    if format == "MXFP4":
        blocks[..., 0] = rng.integers(105, 130, blocks.shape[:2])
        return blocks.reshape(ROWS, -1)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(format, (0,)):
        blocks[..., at : at + 2] = scale
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("format", sorted(CONVERTED))
def test_values_stay_or_are_rounded_by_half_a_step(format: str) -> None:
    rows = random_rows(format)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[format])
    got = file_values("Q8_0", as_q8_0(format, ROWS, rows.reshape(-1)).reshape(ROWS, -1))
    if format not in ROUNDED:
        np.testing.assert_array_equal(got, expected)
        return
    blocks = expected.reshape(ROWS, -1, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    smallest_step = 127 * 2.0**-25  # of an fp16 scale
    assert (np.abs(got.reshape(blocks.shape) - blocks) <= 0.6 * step + smallest_step).all()


def test_long_rows_go_through_in_parts() -> None:
    data = np.tile(random_rows("Q5_0"), (300, 8))
    rows = len(data)
    whole = as_q8_0("Q5_0", rows, data.reshape(-1)).reshape(rows, -1)
    np.testing.assert_array_equal(whole[:ROWS], whole[-ROWS:])
    np.testing.assert_array_equal(
        file_values("Q8_0", whole[:3]),
        gguf.quants.dequantize(data[:3], gguf.GGMLQuantizationType.Q5_0),
    )


def test_scales_beyond_fp16_are_rounded_instead() -> None:
    rows = random_rows("MXFP4")
    rows.reshape(ROWS, -1, 17)[..., 0] = MAX_EXPONENT + 1
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4)
    got = file_values("Q8_0", as_q8_0("MXFP4", ROWS, rows.reshape(-1)).reshape(ROWS, -1))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, atol=np.abs(expected).max() / 127)
