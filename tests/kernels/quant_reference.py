"""Quantized matrices in NumPy: random files' bytes, their values, the values of packed tiles."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
BLOCK_BYTES = {
    **{"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 34, "IQ4_XS": 136, "Q4_0": 18},
    **{"F16": 512, "BF16": 512, "F32": 1024},
}
SCALES_AT = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q8_0": [0], "IQ4_XS": [0], "Q4_0": [0]}
KEPT_AS = {"BF16": "F16"}
TILE_ROWS = {"F32": 8}
"""Of the matrix; other types have 16."""

FLOAT_BOUND, REST_BOUND = 2.0**-22, 2.0**-38
"""How far a packed float32 may be off, of itself and of its row's largest value; bf16: only the
latter."""


def random_matrix(format: str, rows: int, columns: int, rng: np.random.Generator) -> Array:
    """Bytes `[rows, bytes of a row]` as a file has them; values of order 0.01 to 1."""
    if format in ("F16", "BF16", "F32"):
        return float_matrix(format, rng.normal(0, 0.02, (rows, columns)))
    blocks = columns // (32 if format in ("Q8_0", "Q4_0") else 256)
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_BYTES[format]), np.uint8)
    for at in SCALES_AT[format]:
        scale = rng.uniform(0.5, 1.5, (rows, blocks, 1)) * (0.0002 if "K" in format else 0.001)
        raw[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def float_matrix(format: str, values: Array) -> Array:
    """Bytes `[rows, bytes of a row]` of F16, BF16 or F32, truncated."""
    single = values.astype(np.float32)
    if format == "BF16":
        return (single.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return (single.astype(np.float16) if format == "F16" else single).view(np.uint8)


def of_any_magnitude(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """Rows from 1e-30 to 1e36, within each six orders of magnitude; one is all zeros."""
    values = rng.normal(size=(rows, columns)) * 10.0 ** rng.uniform(-6, 0, (rows, columns))
    values *= 10.0 ** np.linspace(-30, 36, rows)[:, None]
    values[rows // 3] = 0
    return values


EXACT_TOLERANCE = 5e-5
"""Of the norm, where weights and activations are exact: what tensor cores cut off of sums."""


def assert_exact(got: Array, x: Array, format: str, data: Array) -> None:
    """Each column of `got` `[tokens, rows]` is x times a row of the matrix."""
    expected = x.astype(np.float64) @ file_values(format, data).astype(np.float64).T
    error = np.linalg.norm(got.astype(np.float64) - expected, axis=0)
    assert (error <= EXACT_TOLERANCE * np.linalg.norm(expected, axis=0)).all()


def _half(raw: Array, at: int) -> Array:
    return np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16).astype(np.float32)


def _six_bits(sc: Array) -> tuple[Array, Array]:
    low, high = sc[..., 0:4], sc[..., 4:8]
    last = sc[..., 8:12]
    scale = np.concatenate([low & 63, (last & 15) | (low >> 6) << 4], -1)
    return scale, np.concatenate([high & 63, (last >> 4) | (high >> 6) << 4], -1)


def _nibbles(qs: Array) -> Array:
    """`[..., groups, bytes]` to `[..., groups, 2 * bytes]`: low nibbles, then high ones."""
    return np.concatenate([qs & 15, qs >> 4], -1)


def file_values(format: str, raw: Array) -> Array:
    """Float32 `[rows, columns]` by the formulas of the format."""
    rows = raw.shape[0]
    if format == "F32":
        return raw.view(np.float32)
    if format == "F16":
        return raw.view(np.float16).astype(np.float32)
    if format == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    b = raw.reshape(rows, -1, BLOCK_BYTES[format])
    shape = (rows, b.shape[1])
    if format == "Q8_0":
        return (_half(b, 0) * b[..., 2:].view(np.int8)).reshape(rows, -1)
    if format == "Q4_0":
        return (_half(b, 0) * (_nibbles(b[..., 2:]).astype(np.float32) - 8)).reshape(rows, -1)
    if format in ("Q4_K", "Q5_K"):
        scale, minimum = _six_bits(b[..., 4:16])
        q = _nibbles(b[..., -128:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32)
        if format == "Q5_K":
            high = b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
            q = q | high << 4
        d, m = _half(b, 0) * scale, _half(b, 2) * minimum
        return (d[..., None] * q - m[..., None]).astype(np.float32).reshape(rows, -1)
    if format == "Q6_K":
        low = _nibbles(b[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        high = b[..., 128:192].reshape(*shape, 2, 1, 32) >> shifts & 3
        q = (low | high << 4).reshape(*shape, 16, 16).astype(np.float32) - 32
        scale = _half(b, 208) * b[..., 192:208].view(np.int8)
        return (scale[..., None] * q).reshape(rows, -1)
    high = np.ascontiguousarray(b[..., 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = b[..., 4:8, None] >> np.array([0, 4], np.uint8) & 15
    scale = (low.reshape(*shape, 8) | (high & 3) << 4).astype(np.float32) - 32
    q = IQ4[_nibbles(b[..., 8:].reshape(*shape, 8, 16))]
    return ((_half(b, 0) * scale)[..., None] * q).astype(np.float32).reshape(rows, -1)


def packed_values(kind: str, tiles: Array, rows: int) -> Array:
    """Float32 `[rows, columns]` of tiles `[stripes, blocks, 4, tile bytes]`, by their layout."""
    stripes, blocks = tiles.shape[:2]
    value = _tile_values(kind, tiles.reshape(-1, tiles.shape[-1]))
    height = TILE_ROWS.get(kind, 16)
    value = value.reshape(stripes, blocks, 4, height, 256).transpose(0, 2, 3, 1, 4)
    return value.reshape(stripes * 4 * height, blocks * 256)[:rows]


def _words(tiles: Array, start: int, stop: int) -> Array:
    return np.ascontiguousarray(tiles[:, start:stop]).view(np.uint32)


def _by_row(lanes: Array) -> Array:
    """`[tiles, half 2, lane 32, values]` (32 columns a half) to `[tiles, 8 rows, 256 columns]`."""
    n = lanes.shape[0]
    return lanes.reshape(n, 2, 8, 4, 32).transpose(0, 2, 3, 1, 4).reshape(n, 8, 256)


def _both_halves(lanes: Array) -> Array:
    """`[tiles, half, row half, lane, 32 columns]` to `[tiles, 16 rows, 256 columns]`."""
    return np.concatenate([_by_row(lanes[:, :, 0]), _by_row(lanes[:, :, 1])], 1)


def _pairs(words: Array, bits: int, pairs: int) -> Array:
    """Columns of words whose pair p lies at bits `bits * p` and `bits * p + 16`."""
    shifts = bits * np.arange(pairs, dtype=np.uint32)
    mask = np.uint32((1 << bits) - 1)
    both = np.stack([words[..., None] >> shifts & mask, words[..., None] >> shifts + 16 & mask], -1)
    return both.reshape(*words.shape[:-1], -1)


def _codes(kind: str, tiles: Array) -> Array:
    n = tiles.shape[0]
    if kind == "Q8_0":
        code = tiles[:, :4096].reshape(n, 2, 2, 2, 32, 16).transpose(0, 1, 3, 4, 2, 5)
        return _both_halves(code.reshape(n, 2, 2, 32, 32)).astype(np.int32) - 128
    if kind in ("F16", "F32"):
        half = np.ascontiguousarray(tiles[:, :8192]).view(np.float16).reshape(n, 16, 8, 4, 2, 2, 2)
        # [tile, step, g, t, pair, row half, e] to [tile, row half, g, t, step, pair, e]
        return half.transpose(0, 5, 2, 3, 1, 4, 6).reshape(n, 16, 256)
    words = _words(tiles, 0, 2048).reshape(n, 2, 2, 32, 4)
    code = _both_halves(_pairs(words, 4, 4)).astype(np.int32)
    if kind == "Q5_K":
        high = _words(tiles, 2048, 2560).reshape(n, 32, 2, 2).transpose(0, 2, 3, 1)
        code |= _both_halves(_pairs(high[..., None], 1, 16)).astype(np.int32) << 4
    if kind == "Q6_K":
        high = _words(tiles, 2048, 3072).reshape(n, 2, 32, 2, 2).transpose(0, 3, 1, 2, 4)
        code |= _both_halves(_pairs(high, 2, 8)).astype(np.int32) << 4
    return code


def _tile_values(kind: str, tiles: Array) -> Array:
    n, code = tiles.shape[0], _codes(kind, tiles)
    if kind in ("F16", "F32"):
        factors = np.ascontiguousarray(tiles[:, 8192:]).view(np.float32)
        value = factors[..., None] * code.astype(np.float32)
        return value if kind == "F16" else value[:, :8] + value[:, 8:]
    if kind in ("Q8_0", "Q4_0"):
        d = np.ascontiguousarray(tiles[:, -256:]).view(np.float16).reshape(n, 16, 8)
        zero = 8 if kind == "Q4_0" else 0
        return np.repeat(d.astype(np.float32), 32, -1) * (code - zero).astype(np.float32)
    if kind == "Q6_K":
        scale = tiles[:, 3072:3328].view(np.int8).reshape(n, 16, 16)
        d = np.ascontiguousarray(tiles[:, 3328:]).view(np.float16).astype(np.float32)
        return np.repeat(d[..., None] * scale, 16, -1) * (code - 32).astype(np.float32)
    if kind == "IQ4_XS":
        word = np.ascontiguousarray(tiles[:, 2048:]).view(np.uint16).reshape(n, 16, 4)
        bits = (word >> 12) << np.arange(0, 16, 4, dtype=np.uint16)
        d = bits.sum(-1).astype(np.uint16).view(np.float16).astype(np.float32)
        scale = np.stack([word & 63, word >> 6 & 63], -1).reshape(n, 16, 8).astype(np.float32) - 32
        return np.repeat(d[..., None] * scale, 32, -1) * IQ4[code].astype(np.float32)
    word = _words(tiles, tiles.shape[1] - 256, tiles.shape[1]).reshape(n, 16, 4)
    fields = [word >> s & 63 for s in (0, 6, 12, 18)]
    scale = np.stack(fields[:2], -1).reshape(n, 16, 8)
    minimum = np.stack(fields[2:], -1).reshape(n, 16, 8)
    d = (word >> 24).astype(np.uint8).view(np.float16).astype(np.float32)
    ds, dm = d[..., :1] * scale, d[..., 1:] * minimum
    product = np.repeat(ds.astype(np.float32), 32, -1) * code.astype(np.float32)
    return product - np.repeat(dm.astype(np.float32), 32, -1)


def panel_values(raw: np.ndarray[Any, Any], num_tokens: int, columns: int) -> np.ndarray[Any, Any]:
    """float32 `[num_tokens, columns]` of an operand in panels; the layout's plain definition."""
    halves = raw.reshape(-1).view(np.float16).reshape(-1, columns // 256, 8, 8, 4, 8)
    tokens = halves.transpose(0, 3, 1, 4, 2, 5).reshape(-1, columns)
    return tokens[:num_tokens].astype(np.float32) * 8


def chunk_values(raw: np.ndarray[Any, Any], num_tokens: int, columns: int) -> np.ndarray[Any, Any]:
    """float32 `[num_tokens, columns]` of an operand in chunks; the layout's plain definition."""
    lines = raw.reshape(-1).view(np.float16).reshape(columns // 64, -1, 8, 8)[:, :num_tokens]
    swizzled = np.arange(8)[None] ^ (np.arange(num_tokens) % 8)[:, None]
    lines = np.take_along_axis(lines, swizzled[None, :, :, None], axis=2)
    permuted = lines.reshape(columns // 256, 4, num_tokens, 64).transpose(2, 0, 1, 3)
    steps = permuted.reshape(num_tokens, columns // 256, 16, 2, 4, 2)
    values = steps.transpose(0, 1, 4, 2, 3, 5).reshape(num_tokens, columns)
    return values.astype(np.float32) * 8
