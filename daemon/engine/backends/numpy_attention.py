"""Gated full attention over paged keys and values in NumPy: the reference.

Owns the mathematics of one layer, from projected rows to gated values, and the pages of all
layers. Keys are stored rotated. Engine thread only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.numpy_delta_net import Float32, rms_norm, sigmoid
from daemon.engine.batch import Span
from daemon.engine.model.shape import AttentionShape, RopeShape

ForEach = Callable[[Callable[[int], None], int], None]
"""Calls a function for each of so many blocks, perhaps on several threads."""


class AttentionConstants(Struct, frozen=True):
    """One layer's small weights: norms over a head, `[head_dim]`."""

    q_norm: Float32
    k_norm: Float32
    norm_eps: float


class KVPool:
    """Keys and values of all layers: `[layers, 2, pages, PAGE_TOKENS, kv_heads, head_dim]`."""

    def __init__(self, num_layers: int, shape: AttentionShape, num_pages: int) -> None:
        extents = (num_layers, 2, num_pages, PAGE_TOKENS, shape.num_kv_heads, shape.head_dim)
        self.content = np.zeros(extents, np.float32)

    def append(self, layer: int, span: Span, keys: Float32, values: Float32) -> None:
        """Write rows `[tokens, kv_heads, head_dim]` of a span to its pages."""
        positions = np.arange(span.start, span.end)
        pages = np.asarray(span.pages)[positions // PAGE_TOKENS]
        self.content[layer, 0, pages, positions % PAGE_TOKENS] = keys
        self.content[layer, 1, pages, positions % PAGE_TOKENS] = values

    def prefix(self, layer: int, pages: tuple[int, ...], num_tokens: int) -> tuple[Any, Any]:
        """Keys and values `[num_tokens, kv_heads, head_dim]`; a view where pages are adjacent."""
        num_pages = -(-num_tokens // PAGE_TOKENS)
        first, used = pages[0], pages[:num_pages]
        adjacent = used == tuple(range(first, first + num_pages))
        selection = slice(first, first + num_pages) if adjacent else list(used)
        k, v = (
            self.content[layer, which][selection].reshape(-1, *self.content.shape[-2:])
            for which in (0, 1)
        )
        return k[:num_tokens], v[:num_tokens]


def rotation_table(rope: RopeShape, positions: np.ndarray[Any, Any]) -> tuple[Float32, Float32]:
    """Cosine and sine `[..., 1, rope_dim / 2]` for positions; angles in float64."""
    angles = positions[..., None, None] * np.asarray(rope.frequencies)
    return (
        (np.cos(angles) * rope.magnitude).astype(np.float32),
        (np.sin(angles) * rope.magnitude).astype(np.float32),
    )


def rotate(x: Float32, rotation: tuple[Float32, Float32]) -> Float32:
    """Rotary embedding of the first dims of each head, in pairs (i, i + rope_dim / 2)."""
    cos, sin = rotation
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]]
    return np.concatenate(turned, axis=-1)


def attend(
    shape: AttentionShape,
    constants: AttentionConstants,
    pool: KVPool,
    layer: int,
    span: Span,
    rows: Float32,
    rotation: tuple[Float32, Float32],
    for_each: ForEach,
) -> Float32:
    """One span: rows `[blocks, rows, (query | gate) per head | key | value]` to gated values.

    The queries of a block attend to all keys up to the block's end, so that a row's bits depend on
    its position alone. Padding rows past the span's end are computed and mean nothing.
    """
    q, gate, k, v = _heads(shape, constants, rows, rotation)
    flat = (-1, shape.num_kv_heads, shape.head_dim)
    count = len(span.tokens)
    pool.append(layer, span, k.reshape(flat)[:count], v.reshape(flat)[:count])
    block_rows = rows.shape[1]
    out = np.empty_like(q)

    def attend_block(block: int) -> None:
        first = span.start + block * block_rows
        keys, values = pool.prefix(layer, span.pages, first + block_rows)
        out[block] = _causal(shape, q[block], keys, values, first)

    for_each(attend_block, rows.shape[0])
    gated: Float32 = (out * sigmoid(gate)).reshape(*rows.shape[:2], -1)
    return gated


def _heads(
    shape: AttentionShape,
    constants: AttentionConstants,
    rows: Float32,
    rotation: tuple[Float32, Float32],
) -> tuple[Float32, Float32, Float32, Float32]:
    """Normed and rotated queries, raw gates, normed and rotated keys, values, by head."""
    lead, size = rows.shape[:-1], shape.head_dim
    edges = np.cumsum([shape.num_heads * 2 * size, shape.num_kv_heads * size])
    queries, keys, values = np.split(rows, edges, axis=-1)
    queries = queries.reshape(*lead, shape.num_heads, 2 * size)
    q, gate = queries[..., :size], queries[..., size:]
    k = keys.reshape(*lead, shape.num_kv_heads, size)
    q = rotate(rms_norm(q, constants.q_norm, constants.norm_eps), rotation)
    k = rotate(rms_norm(k, constants.k_norm, constants.norm_eps), rotation)
    return q, gate, k, values.reshape(*lead, shape.num_kv_heads, size)


def _causal(
    shape: AttentionShape, q: Float32, keys: Float32, values: Float32, first: int
) -> Float32:
    """softmax(q kᵀ / sqrt(head_dim)) v for rows `[rows, heads, head_dim]` from position `first`.

    Query head h uses KV head h // group.
    """
    num_rows, num_keys = q.shape[0], keys.shape[0]
    scaled = q * np.float32(shape.head_dim**-0.5)
    stacked = scaled.reshape(num_rows, shape.num_kv_heads, shape.group, shape.head_dim)
    # Queries as columns: the keys, by far the larger operand, are then read in memory order.
    columns = np.ascontiguousarray(stacked.transpose(1, 3, 2, 0)).reshape(
        shape.num_kv_heads, shape.head_dim, -1
    )
    scores = np.ascontiguousarray(np.matmul(keys.transpose(1, 0, 2), columns).swapaxes(-1, -2))
    if num_rows > 1:
        late = np.arange(num_keys) > (first + np.arange(num_rows))[:, None]
        by_row = scores.reshape(shape.num_kv_heads, shape.group, num_rows, num_keys)
        np.copyto(by_row, np.float32(-np.inf), where=late)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = np.matmul(scores, values.transpose(1, 0, 2))
    grouped = mixed.reshape(shape.num_kv_heads, shape.group, num_rows, shape.head_dim)
    return grouped.transpose(2, 0, 1, 3).reshape(q.shape)
