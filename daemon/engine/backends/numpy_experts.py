"""Mixture of experts in NumPy: the reference. Router, routed experts, shared expert.

Every row is multiplied alone, so that its bits do not depend on which rows chose the same expert.
Engine thread only.
"""

from typing import Any

import numpy as np

from daemon.engine.backends.numpy_delta_net import Float32, sigmoid, silu

MIN_ROUTED_SUM = np.float32(2.0**-14)
"""The sum of the chosen probabilities is held above this, as llama.cpp does."""


def swiglu(gate_up: Float32) -> Float32:
    """SiLU of the first half of the columns, times the second half."""
    half = gate_up.shape[-1] // 2
    return silu(gate_up[..., :half]) * gate_up[..., half:]


def route(scores: Float32, num_used: int) -> tuple[np.ndarray[Any, Any], Float32]:
    """Router logits `[rows, experts]` to chosen experts and their weights, `[rows, num_used]`.

    Softmax over all, the largest `num_used` (ties: lower index), divided by their sum.
    """
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = shifted / shifted.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-shares, axis=-1, kind="stable")[:, :num_used]
    weights = np.take_along_axis(shares, chosen, axis=-1)
    return chosen, weights / np.maximum(weights.sum(axis=-1, keepdims=True), MIN_ROUTED_SUM)


def routed(
    x: Float32, gate_up: Float32, down: Float32, chosen: np.ndarray[Any, Any], weights: Float32
) -> Float32:
    """Σ w_e down_e(swiglu(gate_up_e(x))) for rows `[rows, hidden]`.

    `gate_up` is `[experts, hidden, 2 * width]`, `down` `[experts, width, hidden]`. A row's experts
    are added in order of their rank in `chosen`.
    """
    outputs = np.empty((*chosen.shape, x.shape[-1]), np.float32)
    for expert in np.unique(chosen):
        rows, ranks = np.nonzero(chosen == expert)
        hidden = swiglu(np.matmul(x[rows, None, :], gate_up[expert]))
        outputs[rows, ranks] = np.matmul(hidden, down[expert])[:, 0]
    total = weights[:, 0, None] * outputs[:, 0]
    for rank in range(1, chosen.shape[1]):
        total += weights[:, rank, None] * outputs[:, rank]
    return total


def shared(x: Float32, scores: Float32, gate_up: Float32, down: Float32) -> Float32:
    """σ(scores) times the shared expert, for blocks `[blocks, rows, hidden]`.

    `scores` is `[blocks, rows, 1]`; the matrices are those of one expert.
    """
    hidden = swiglu(np.matmul(x, gate_up))
    return sigmoid(scores) * np.matmul(hidden, down)
