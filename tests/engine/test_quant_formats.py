"""De-quantisation: sizes and values of every promised format, against the `gguf` package."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from benchmarks.random_tensors import RandomTensor
from daemon.engine.weights.quant_formats import DECODABLE, QUANT_FORMATS, dequantize

FORMATS = {format.name: format for format in QUANT_FORMATS.values()}
SHAPES = [(1, 256), (7, 512), (3, 5, 256)]


def test_the_table_is_the_published_one() -> None:
    assert DECODABLE <= set(FORMATS)
    for kind in GGMLQuantizationType:
        format = QUANT_FORMATS[int(kind)]
        assert (format.block_elements, format.block_bytes) == GGML_QUANT_SIZES[kind]
        assert format.name == kind.name


@pytest.mark.parametrize("name", sorted(DECODABLE))
@pytest.mark.parametrize("shape", SHAPES)
def test_values(name: str, shape: tuple[int, ...]) -> None:
    kind = GGMLQuantizationType[name]
    data = RandomTensor(name=name, shape=shape, format=kind, std=0.5).piece(0).view(np.uint8)
    values = dequantize(data.reshape(-1), FORMATS[name], shape)
    assert values.dtype == np.float32
    assert values.shape == shape
    rows = data.reshape(*shape[:-1], -1)
    np.testing.assert_array_equal(values, quants.dequantize(rows, kind).reshape(shape))
    assert np.isfinite(values).all()
    assert 0.3 < values.std() < 0.8


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_quantised_values_come_back(name: str) -> None:
    """Within half a step of the coarsest code, by the package's own quantiser."""
    kind = GGMLQuantizationType[name]
    original = np.random.default_rng(3).standard_normal((16, 256)).astype(np.float32)
    data = quants.quantize(original, kind).reshape(-1).view(np.uint8)
    values = dequantize(data, FORMATS[name], original.shape)
    bits = 4 if "4" in name else 5 if "5" in name else 8
    bound = 2 * np.abs(original).max() / 2**bits
    assert np.abs(values - original).max() < bound


def test_special_values_of_plain_formats() -> None:
    special = np.asarray([0.0, -0.0, 1.0, -1.0, 2.0**-14, 65_504.0], np.float32)
    halves = special.astype(np.float16).view(np.uint8)
    np.testing.assert_array_equal(dequantize(halves, FORMATS["F16"], (6,)), special)
    singles = special.view(np.uint8)
    np.testing.assert_array_equal(dequantize(singles, FORMATS["F32"], (6,)), special)


def test_mxfp4_smallest_exponents() -> None:
    """Exponent bytes 0 and 1 are 2⁻¹²⁷ and 2⁻¹²⁶: subnormal, not zero."""
    block = np.full((2, 17), 0x22, np.uint8)
    block[:, 0] = 0, 1
    values = dequantize(block.reshape(-1), FORMATS["MXFP4"], (2, 32))
    np.testing.assert_array_equal(values[0], np.float32(2.0**-127))
    np.testing.assert_array_equal(values[1], np.float32(2.0**-126))
