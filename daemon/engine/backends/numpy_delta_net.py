"""The gated delta rule in NumPy: the reference, in its recurrent and its chunked form.

Owns the mathematics of one layer, from projected rows to gated, normed values. State in float32,
`[v_heads, k_dim, v_dim]`; value head h uses key head h mod k_heads. Engine thread only.
Source: Gated Delta Networks, arXiv 2412.06464; the chunked form is its WY representation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.batch import Capture, Span
from daemon.engine.model.shape import DeltaNetShape

Float32 = np.ndarray[Any, np.dtype[np.float32]]
L2_EPS = np.float32(1e-6)
CHUNK = PAGE_TOKENS
SOFTPLUS_LINEAR_FROM = 20.0


class DeltaNetConstants(Struct, frozen=True):
    """One layer's small weights: `conv` `[width, conv_dim]`, `decay` and `dt_bias` `[v_heads]`."""

    conv: Float32
    decay: Float32
    dt_bias: Float32
    gated_norm: Float32
    norm_eps: float


class DeltaNetState(Struct, frozen=True):
    """One slot, one layer, as views: `rule` `[v_heads, k_dim, v_dim]`, `conv` `[width - 1, c]`.

    `conv` are the projected rows before the convolution, oldest first.
    """

    rule: Float32
    conv: Float32


def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x)); held where exp would overflow, at a value below the smallest normal."""
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-np.maximum(x, np.float32(-88.0))))


def silu(x: Float32) -> Float32:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Float32) -> Float32:
    """log(1 + exp(x)), exact for very negative x, where slow heads would add up the error."""
    small = np.minimum(x, np.float32(SOFTPLUS_LINEAR_FROM))
    return np.where(x > SOFTPLUS_LINEAR_FROM, x, np.log1p(np.exp(small))).astype(np.float32)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x / sqrt(mean(x²) + eps) * weight, over the last axis."""
    mean = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    return x * (np.float32(1.0) / np.sqrt(mean + np.float32(eps))) * weight


def l2_norm(x: Float32) -> Float32:
    """x / sqrt(sum(x²) + 1e-6), over the last axis; the epsilon is beside the sum."""
    return x / np.sqrt(np.einsum("...i,...i->...", x, x)[..., None] + L2_EPS)


def step(
    shape: DeltaNetShape, constants: DeltaNetConstants, state: DeltaNetState, row: Float32
) -> Float32:
    """One token: `row` `[qkv | z | beta | alpha]` to `[v_heads * v_dim]`; advances the state.

    M ← e^g M;  d = β (v - Mᵀk);  M ← M + k dᵀ;  o = Mᵀq  with the updated M.
    """
    qkv, z, beta, log_decay = _split(shape, constants, row)
    taps = constants.conv
    mixed = taps[-1] * qkv
    for tap, past in zip(taps[:-1], state.conv, strict=True):
        mixed += tap * past
    state.conv[:-1] = state.conv[1:]
    state.conv[-1] = qkv
    q, k, v = _heads(shape, silu(mixed))
    repeat = shape.num_v_heads // shape.num_k_heads
    q, k = np.tile(q, (repeat, 1)), np.tile(k, (repeat, 1))
    rule = state.rule
    rule *= np.exp(log_decay)[:, None, None]
    error = beta[:, None] * (v - np.matmul(k[:, None, :], rule)[:, 0])
    rule += k[:, :, None] * error[:, None, :]
    out = np.matmul(q[:, None, :], rule)[:, 0]
    return _gate(shape, constants, out, z)


def chunks(
    shape: DeltaNetShape,
    constants: DeltaNetConstants,
    state: DeltaNetState,
    rows: Float32,
    span: Span,
    captured: Sequence[tuple[Capture, DeltaNetState]],
) -> Float32:
    """A span on the grid: rows `[chunks, CHUNK, qkv | z | beta | alpha]` to values.

    Rows past the span's end are padding: their keys, values, β and g count as zero, which leaves
    the state as it is. Gives `[chunks, CHUNK, v_heads * v_dim]`; advances the state, and copies it
    at each captured position.
    """
    qkv, z, beta, log_decay = _split(shape, constants, rows)
    is_token = (np.arange(rows.shape[0] * CHUNK) < len(span.tokens)).reshape(-1, CHUNK, 1)
    q, k, v = _heads(shape, silu(_convolve(constants.conv, state.conv, qkv)) * is_token)
    work = _ChunkWork.prepare(shape, q, k, v, beta * is_token, log_decay * is_token)
    tails = {span.start + (i + 1) * CHUNK: i for i in range(rows.shape[0])}
    copies = {tails[capture.position]: target for capture, target in captured}
    out = np.empty_like(v)
    for chunk in range(rows.shape[0]):
        out[chunk] = work.scan(chunk, state.rule).transpose(1, 0, 2)
        if chunk in copies:
            copies[chunk].rule[:] = state.rule
            copies[chunk].conv[:] = qkv[chunk, CHUNK - len(state.conv) :]
    _keep_last_rows(state.conv, qkv.reshape(-1, shape.conv_dim)[: len(span.tokens)])
    return _gate(shape, constants, out, z)


class _ChunkWork(Struct, frozen=True):
    """What of a chunk does not depend on the state; leading axes `[chunks, v_heads]`."""

    values: Float32  # U = T (β V)
    keys: Float32  # W = T (β e^G K)
    queries: Float32  # e^G Q
    scores: Float32  # lower triangle of Q Kᵀ ∘ L
    carry: Float32  # e^(G_end - G) K
    end_decay: Float32  # e^(G_end), [chunks, v_heads]

    @classmethod
    def prepare(
        cls,
        shape: DeltaNetShape,
        q: Float32,
        k: Float32,
        v: Float32,
        beta: Float32,
        log_decay: Float32,
    ) -> "_ChunkWork":
        repeat = shape.num_v_heads // shape.num_k_heads
        q, k, v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v))
        key_scores = np.tile(np.matmul(k, k.swapaxes(-1, -2)), (1, repeat, 1, 1))
        scores = np.tile(np.matmul(q, k.swapaxes(-1, -2)), (1, repeat, 1, 1))
        q, k = np.tile(q, (1, repeat, 1, 1)), np.tile(k, (1, repeat, 1, 1))
        beta = beta.transpose(0, 2, 1)[..., None]
        total = np.cumsum(log_decay.transpose(0, 2, 1), axis=-1, dtype=np.float32)
        # Above the diagonal the difference is positive and may overflow: mask before exp.
        gap = total[..., :, None] - total[..., None, :]
        decay = np.exp(np.where(np.tri(CHUNK, dtype=bool), gap, np.float32(-np.inf)))
        inverse = invert_unit_lower(beta * key_scores * decay)
        growth = np.exp(total)[..., None]
        return cls(
            values=np.matmul(inverse, beta * v),
            keys=np.matmul(inverse, beta * growth * k),
            queries=growth * q,
            scores=scores * decay,
            carry=np.exp(total[..., -1:] - total)[..., None] * k,
            end_decay=np.exp(total[..., -1]),
        )

    def scan(self, chunk: int, rule: Float32) -> Float32:
        """Output `[v_heads, CHUNK, v_dim]` of one chunk; the state `rule` moves to its end."""
        fresh = self.values[chunk] - np.matmul(self.keys[chunk], rule)
        out: Float32 = np.matmul(self.queries[chunk], rule) + np.matmul(self.scores[chunk], fresh)
        rule *= self.end_decay[chunk][:, None, None]
        rule += np.matmul(self.carry[chunk].swapaxes(-1, -2), fresh)
        return out


def invert_unit_lower(a: Float32) -> Float32:
    """(I + strictly lower part of `a`)⁻¹ over the last two axes, whose size is a power of two.

    Blocks of size 1, 2, 4, … are joined: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹ C A⁻¹, B⁻¹]]. As
    stable as forward substitution, where a product of powers of `a` would lose all digits.
    """
    size = a.shape[-1]
    inverse = np.broadcast_to(np.eye(size, dtype=np.float32), a.shape).copy()
    width = 1
    while width < size:
        lower = _diagonal_blocks(a, width, below=True)
        first = _diagonal_blocks(inverse, width, below=False, offset=0)
        second = _diagonal_blocks(inverse, width, below=False, offset=1)
        joined = -np.matmul(np.matmul(second, lower), first)
        _diagonal_blocks(inverse, width, below=True)[...] = joined
        width *= 2
    return inverse


def _diagonal_blocks(matrix: Float32, width: int, *, below: bool, offset: int = 0) -> Float32:
    """View of the width-blocks of each 2-width block on the diagonal: `[..., pairs, w, w]`.

    `below` takes the lower left one, else the upper left (`offset` 0) or lower right one (1).
    """
    row = 1 if below else offset
    column = 0 if below else offset
    *_, row_stride, column_stride = matrix.strides
    num_pairs = matrix.shape[-1] // (2 * width)
    start = matrix[..., row * width :, column * width :]
    return np.lib.stride_tricks.as_strided(
        start,
        shape=(*matrix.shape[:-2], num_pairs, width, width),
        strides=(
            *matrix.strides[:-2],
            2 * width * (row_stride + column_stride),
            row_stride,
            column_stride,
        ),
    )


def _split(
    shape: DeltaNetShape, constants: DeltaNetConstants, rows: Float32
) -> tuple[Float32, Float32, Float32, Float32]:
    """Projected rows to qkv, z, β = σ(b) and g = A softplus(a + dt), the logarithm of decay."""
    edges = np.cumsum([shape.conv_dim, shape.value_size, shape.num_v_heads])
    qkv, z, b, a = np.split(rows, edges, axis=-1)
    return qkv, z, sigmoid(b), constants.decay * softplus(a + constants.dt_bias)


def _heads(shape: DeltaNetShape, mixed: Float32) -> tuple[Float32, Float32, Float32]:
    """Convolved channels to heads `[..., heads, dim]`; q and k of length one, q scaled."""
    q, k, v = np.split(mixed, [shape.key_size, 2 * shape.key_size], axis=-1)
    lead = mixed.shape[:-1]
    q = l2_norm(q.reshape(*lead, shape.num_k_heads, shape.k_dim))
    k = l2_norm(k.reshape(*lead, shape.num_k_heads, shape.k_dim))
    scale = np.float32(shape.k_dim**-0.5)
    return q * scale, k, v.reshape(*lead, shape.num_v_heads, shape.v_dim)


def _convolve(taps: Float32, past: Float32, qkv: Float32) -> Float32:
    """Causal depthwise convolution over `[chunks, CHUNK, channels]`, after the `past` rows."""
    rows = qkv.reshape(-1, qkv.shape[-1])
    padded = np.concatenate([past, rows])
    mixed = taps[-1] * rows
    for j, tap in enumerate(taps[:-1]):
        mixed += tap * padded[j : j + len(rows)]
    return mixed.reshape(qkv.shape)


def _keep_last_rows(past: Float32, rows: Float32) -> None:
    past[:] = np.concatenate([past, rows[-len(past) :]])[-len(past) :]


def _gate(shape: DeltaNetShape, constants: DeltaNetConstants, out: Float32, z: Float32) -> Float32:
    """RMSNorm per head, times SiLU(z): norm first, then the gate."""
    normed = rms_norm(out, constants.gated_norm, constants.norm_eps)
    return normed.reshape(z.shape) * silu(z)
