"""Random weights in any GGUF format, made as bytes: nothing is quantised, so it is fast.

The bits of a quantised block are random and only its scales are set, so that the values have mean
zero and the standard deviation that is asked for. Each tensor has its own stream of numbers, from
the seed, its name and the piece.
"""

import zlib
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from msgspec import Struct

PIECE_ELEMENTS = 2**23
F32, F16, BF16 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))
MXFP4 = GGMLQuantizationType.MXFP4


class ScaleFields(Struct, frozen=True):
    """Where a block keeps its float16 scale and offset (None: it has none).

    With an offset of `ratio` times the scale, random bits have mean zero.
    """

    scale_at: int
    offset_at: int | None = None
    ratio: float = 0.0


SCALE_FIELDS = {
    GGMLQuantizationType[name]: fields
    for name, fields in {
        "Q8_0": ScaleFields(0),
        "Q4_0": ScaleFields(0),
        "Q4_1": ScaleFields(0, 2, -7.5),
        "Q5_0": ScaleFields(0),
        "Q5_1": ScaleFields(0, 2, -15.5),
        "Q2_K": ScaleFields(80, 82, 1.5),
        "Q3_K": ScaleFields(108),
        "Q4_K": ScaleFields(0, 2, 7.5),
        "Q5_K": ScaleFields(0, 2, 15.5),
        "Q6_K": ScaleFields(208),
        "IQ4_NL": ScaleFields(0),
        "IQ4_XS": ScaleFields(0),
    }.items()
}


class RandomTensor(Struct, frozen=True, kw_only=True):
    """A tensor of normal (plain formats) or random-bit (quantised formats) values."""

    name: str
    shape: tuple[int, ...]
    format: GGMLQuantizationType
    std: float
    mean: float = 0.0
    seed: int = 0

    @property
    def num_elements(self) -> int:
        """Values in the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_pieces(self) -> int:
        """Parts of some megabytes that are made independently."""
        return -(-self.num_elements // PIECE_ELEMENTS)

    def piece(self, index: int) -> np.ndarray:
        """The bytes of one part."""
        stream = [self.seed, zlib.crc32(self.name.encode()), index]
        rng = np.random.Generator(np.random.SFC64(stream))
        count = min(self.num_elements - index * PIECE_ELEMENTS, PIECE_ELEMENTS)
        if self.format in (F32, F16, BF16):
            values = rng.standard_normal(count, np.float32)
            values *= np.float32(self.std)
            values += np.float32(self.mean)
            return _narrow(values, self.format)
        assert self.mean == 0.0
        return random_blocks(rng, self.format, count, self.std)


class GivenTensor(Struct, frozen=True, kw_only=True):
    """A small float32 tensor with the values it is given."""

    name: str
    values: np.ndarray
    format: GGMLQuantizationType = F32

    @property
    def shape(self) -> tuple[int, ...]:
        """As the values have it."""
        return self.values.shape

    @property
    def num_pieces(self) -> int:
        """All at once."""
        return 1

    def piece(self, index: int) -> np.ndarray:
        """The values."""
        return np.ascontiguousarray(self.values, np.float32)


def random_blocks(
    rng: np.random.Generator, format: GGMLQuantizationType, count: int, std: float
) -> np.ndarray:
    """`count` values as blocks of a quantised format: `[blocks, block_bytes]` uint8."""
    block_elements, block_bytes = GGML_QUANT_SIZES[format]
    blocks = _random_bytes(rng, count // block_elements, block_bytes)
    scale = std / _unit_std(format)
    if format is MXFP4:
        # Half of the blocks are twice as large: together they have the variance 2.5.
        blocks[:, 0] = 127 + round(np.log2(scale * 2.5**-0.5)) + (blocks[:, 0] & 1)
    else:
        # The sign takes away what is left of the mean where a format's codes are not symmetric.
        signs = np.where(blocks[:, -1] & 1, np.float32(-scale), np.float32(scale))
        _set_scales(blocks, SCALE_FIELDS[format], signs)
    return blocks


@cache
def _unit_std(format: GGMLQuantizationType) -> float:
    """Standard deviation of random bits under a scale of one."""
    block_bytes = GGML_QUANT_SIZES[format][1]
    blocks = _random_bytes(np.random.default_rng(0), 4096, block_bytes)
    if format is MXFP4:
        blocks[:, 0] = 127
    else:
        _set_scales(blocks, SCALE_FIELDS[format], np.ones(len(blocks), np.float32))
    return float(np.std(quants.dequantize(blocks, format)))


def _set_scales(blocks: np.ndarray, fields: ScaleFields, scales: np.ndarray) -> None:
    _set_halves(blocks, fields.scale_at, scales)
    if fields.offset_at is not None:
        _set_halves(blocks, fields.offset_at, scales * np.float32(fields.ratio))


def _set_halves(blocks: np.ndarray, at: int, values: np.ndarray) -> None:
    blocks[:, at : at + 2] = values.astype("<f2")[:, None].view(np.uint8)


def _random_bytes(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    words = rng.integers(0, 2**64 - 1, -(-rows * columns // 8), np.uint64, endpoint=True)
    return words.view(np.uint8)[: rows * columns].reshape(rows, columns)


def _narrow(values: np.ndarray, format: GGMLQuantizationType) -> np.ndarray:
    if format is BF16:
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16) if format is F16 else values
