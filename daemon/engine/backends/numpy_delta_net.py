"""The gated delta rule in NumPy: the reference, in its recurrent and its chunked form.

Owns the mathematics of one layer, from projected rows to gated, normed values. State in float32,
`[v_heads, k_dim, v_dim]`; value head h uses key head h mod k_heads. Engine thread only.
Source: Gated Delta Networks, arXiv 2412.06464; the chunked form is its WY representation.
"""

from typing import Any

import numpy as np
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.model.shape import DeltaNetShape

Float32 = np.ndarray[Any, np.dtype[np.float32]]
L2_EPS = np.float32(1e-6)
CHUNK = PAGE_TOKENS


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
    """1 / (1 + exp(-x)), written as (1 + tanh(x / 2)) / 2, which cannot overflow."""
    half = np.float32(0.5)
    result: Float32 = np.tanh(half * x)
    result *= half
    result += half
    return result


def silu(x: Float32) -> Float32:
    """x * sigmoid(x)."""
    result = sigmoid(x)
    result *= x
    return result


def softplus(x: Float32) -> Float32:
    """log(1 + exp(x)), exact for very negative x, where slow heads would add up the error."""
    return np.logaddexp(x, np.float32(0.0))


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x / sqrt(mean(x²) + eps) * weight, over the last axis."""
    mean = np.vecdot(x, x)[..., None] / np.float32(x.shape[-1])
    result = x / np.sqrt(mean + np.float32(eps))
    result *= weight
    return result


def l2_norm(x: Float32) -> Float32:
    """x / sqrt(sum(x²) + 1e-6), over the last axis; the epsilon is beside the sum."""
    return x / np.sqrt(np.vecdot(x, x)[..., None] + L2_EPS)


def step(
    shape: DeltaNetShape, constants: DeltaNetConstants, state: DeltaNetState, row: Float32
) -> Float32:
    """One token: `row` `[qkv | z | beta | alpha]` to `[v_heads * v_dim]`; advances the state.

    M ← e^g M;  d = β (v - Mᵀk);  M ← M + k dᵀ;  o = Mᵀq, which is (Mᵀq before) + (k·q) d.
    """
    parts = _split(shape, constants, row[None])
    history = np.concatenate([state.conv, parts.qkv])
    q, k, v = _heads(shape, _convolve(constants.conv, history))
    state.conv[:] = history[1:]
    rule = state.rule.reshape(-1, shape.num_k_heads, shape.k_dim, shape.v_dim)
    rule *= np.exp(parts.log_decay)[..., None]
    keys_and_queries = np.concatenate([k, q], axis=-2)
    read = np.matmul(keys_and_queries, rule)
    error = parts.beta[..., None] * (v - read[..., :1, :])
    # NumPy multiplies outer products eight times slower than BLAS: q rides along, times zero.
    added = np.concatenate([error, np.zeros_like(error)], axis=-2)
    rule += np.matmul(keys_and_queries.swapaxes(-1, -2), added)
    out = read[..., 1:, :] + np.vecdot(q, k)[..., None] * error
    return gate(shape, constants, out, parts.z)[0]


class PreparedChunks(Struct, frozen=True):
    """What of chunks does not depend on the state; leading axes are chunk and value head.

    With G the running sum of g, L[i, j] = e^(G_i - G_j) for j ≤ i and the inverse
    T = (I + strict lower part of β K Kᵀ ∘ L)⁻¹:

        new = T (β V) - T (β e^G K) M
        out = e^G Q M + (Q Kᵀ ∘ L) new
        M ← e^(G_end) M + (e^(G_end - G) K)ᵀ new

    Factors with the same right-hand side are stacked: half as many products, each twice as large.
    """

    values: Float32  # T (β V), [.., CHUNK, v_dim]
    on_state: Float32  # T (β e^G K) over e^G Q, [.., 2 CHUNK, k_dim]
    on_new: Float32  # Q Kᵀ ∘ L over (e^(G_end - G) K)ᵀ, [.., CHUNK + k_dim, CHUNK]
    end_decay: Float32  # e^(G_end), [chunks, v_heads]
    z: Float32


def prepare(
    shape: DeltaNetShape,
    constants: DeltaNetConstants,
    past: Float32,
    rows: Float32,
    num_tokens: int,
) -> PreparedChunks:
    """The parallel part of chunks of the grid, rows `[chunks, CHUNK, qkv | z | beta | alpha]`.

    `past` `[chunks, conv_width - 1, qkv]` are the rows before each. The last chunk's rows from
    `num_tokens` on are padding: their keys, values, β and g count as zero, which leaves the state
    as it is.
    """
    parts = _split(shape, constants, rows)
    history = np.concatenate([past, parts.qkv], axis=-2)
    q, k, v = _heads(shape, _convolve(constants.conv, history))
    for padded in (k, v):
        padded[-1, ..., num_tokens:, :] = 0
    for padded in (parts.beta, parts.log_decay):
        padded[-1, ..., num_tokens:] = 0
    q, k = q[:, None], k[:, None]
    beta = parts.beta[..., None]
    total = np.cumsum(parts.log_decay, axis=-1, dtype=np.float32)
    growth = np.exp(total)[..., None]
    # Above the diagonal the difference is positive and may overflow: mask before exp.
    gap = total[..., :, None] - total[..., None, :]
    decay = np.exp(np.where(np.tri(CHUNK, dtype=bool), gap, np.float32(-np.inf)))
    keys_turned = k.swapaxes(-1, -2)
    inverse = invert_unit_lower(beta * np.matmul(k, keys_turned) * decay)
    solved = np.matmul(inverse, np.concatenate([beta * v, (beta * growth) * k], axis=-1))
    scores = np.matmul(q, keys_turned) * decay
    carry = keys_turned * np.exp(total[..., -1:] - total)[..., None, :]
    heads = (len(rows), shape.num_v_heads, -1)
    on_state = np.concatenate([solved[..., shape.v_dim :], growth * q], axis=-2)
    on_new = np.concatenate([scores, carry], axis=-2)
    return PreparedChunks(
        values=solved[..., : shape.v_dim].reshape(*heads, shape.v_dim),
        on_state=on_state.reshape(*heads, shape.k_dim),
        on_new=on_new.reshape(*heads, CHUNK),
        end_decay=growth[..., -1, 0].reshape(len(rows), -1),
        z=parts.z,
    )


def scan(rule: Float32, chunks: PreparedChunks, index: int, head: int) -> Float32:
    """The sequential part, of one chunk and value head: advances `rule` `[k_dim, v_dim]`.

    Gives the raw output, `[CHUNK, v_dim]`.
    """
    seen = np.matmul(chunks.on_state[index, head], rule)
    added = np.matmul(chunks.on_new[index, head], chunks.values[index, head] - seen[:CHUNK])
    rule *= chunks.end_decay[index, head]
    rule += added[CHUNK:]
    out: Float32 = seen[CHUNK:] + added[:CHUNK]
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
        joined = _diagonal_blocks(a, width, below=True)
        if width > 1:
            first = _diagonal_blocks(inverse, width, below=False, offset=0)
            second = _diagonal_blocks(inverse, width, below=False, offset=1)
            joined = np.matmul(np.matmul(second, joined), first)
        np.negative(joined, out=_diagonal_blocks(inverse, width, below=True))
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


class _Parts(Struct, frozen=True):
    """Projected rows: `qkv` and `z` `[.., rows, columns]`, gates `[.., r, k_heads, rows]`."""

    qkv: Float32
    z: Float32
    beta: Float32
    log_decay: Float32


def _split(shape: DeltaNetShape, constants: DeltaNetConstants, rows: Float32) -> _Parts:
    """β = σ(b), and g = A softplus(a + dt), the logarithm of the decay."""
    z_from = shape.conv_dim
    b_from = z_from + shape.value_size
    a_from = b_from + shape.num_v_heads
    beta = sigmoid(rows[..., b_from:a_from])
    log_decay = constants.decay * softplus(rows[..., a_from:] + constants.dt_bias)
    by_head = (*rows.shape[:-2], -1, shape.num_k_heads, rows.shape[-2])
    return _Parts(
        rows[..., :z_from],
        rows[..., z_from:b_from],
        np.ascontiguousarray(beta.swapaxes(-1, -2)).reshape(by_head),
        np.ascontiguousarray(log_decay.swapaxes(-1, -2)).reshape(by_head),
    )


def _convolve(taps: Float32, history: Float32) -> Float32:
    """Causal depthwise convolution, then SiLU. `history` begins `width - 1` rows earlier."""
    num_rows = history.shape[-2] - len(taps) + 1
    mixed = taps[-1] * history[..., -num_rows:, :]
    term = np.empty_like(mixed)
    for j, tap in enumerate(taps[:-1]):
        mixed += np.multiply(tap, history[..., j : j + num_rows, :], out=term)
    return silu(mixed)


def _heads(shape: DeltaNetShape, mixed: Float32) -> tuple[Float32, Float32, Float32]:
    """Channels `[.., rows, c]` to q, k `[.., k_heads, rows, k_dim]` of length one (q scaled) and v
    `[.., r, k_heads, rows, v_dim]`: value head h is (h // k_heads, h mod k_heads)."""
    lead, num_rows = mixed.shape[:-2], mixed.shape[-2]
    qk = mixed[..., : 2 * shape.key_size].reshape(*lead, num_rows, -1, shape.k_dim)
    qk = l2_norm(np.ascontiguousarray(qk.swapaxes(-3, -2)))
    q, k = qk[..., : shape.num_k_heads, :, :], qk[..., shape.num_k_heads :, :, :]
    q *= np.float32(shape.k_dim**-0.5)
    v = mixed[..., 2 * shape.key_size :].reshape(*lead, num_rows, -1, shape.v_dim)
    v = np.ascontiguousarray(v.swapaxes(-3, -2))
    return q, k, v.reshape(*lead, -1, shape.num_k_heads, num_rows, shape.v_dim)


def gate(shape: DeltaNetShape, constants: DeltaNetConstants, out: Float32, z: Float32) -> Float32:
    """RMSNorm per head, times SiLU(z): norm first, then the gate; `[rows, v_heads * v_dim]`."""
    normed = rms_norm(out, constants.gated_norm, constants.norm_eps)
    by_head = normed.reshape(*z.shape[:-2], shape.num_v_heads, z.shape[-2], shape.v_dim)
    return silu(z) * by_head.swapaxes(-3, -2).reshape(z.shape)
