"""The model's weights by role, as handles that only the backend can read.

Owns the naming; `weights/loader.py` fills it, `model/model.py` uses it.
"""

from typing import Any

from msgspec import Struct

Handle = Any
"""A matrix, vector, table or set of experts in the backend's own form."""


class DeltaNetWeights(Struct, frozen=True, kw_only=True):
    """`project` stacks the rows of qkv, z, beta and alpha; `conv` is `[conv_dim, width]`."""

    norm: Handle
    project: Handle
    conv: Handle
    decay: Handle
    dt_bias: Handle
    gated_norm: Handle
    out: Handle


class AttentionWeights(Struct, frozen=True, kw_only=True):
    """`project` stacks the rows of query and gate (per head), key, value."""

    norm: Handle
    project: Handle
    q_norm: Handle
    k_norm: Handle
    out: Handle


class DenseWeights(Struct, frozen=True, kw_only=True):
    """SwiGLU; `gate_up` is a gated matrix."""

    norm: Handle
    gate_up: Handle
    down: Handle


class ExpertWeights(Struct, frozen=True, kw_only=True):
    """Routed experts and the shared one.

    `router` is `[experts, hidden]`, and the shared expert's gate as a last row if there is one;
    `gate_up` `[experts, 2 * expert_dim, hidden]`, `down` `[experts, hidden, expert_dim]`; `shared`
    are gate_up and down of the shared expert, as one expert, or None when the model has none.
    """

    norm: Handle
    router: Handle
    gate_up: Handle
    down: Handle
    shared: tuple[Handle, Handle] | None


class LayerWeights(Struct, frozen=True):
    """One block: a mixer, then a feed-forward part."""

    mixer: DeltaNetWeights | AttentionWeights
    feed_forward: DenseWeights | ExpertWeights


class ModelWeights(Struct, frozen=True, kw_only=True):
    """All of the trunk. `head` is made from the embedding when the model ties them."""

    embedding: Handle
    layers: tuple[LayerWeights, ...]
    norm: Handle
    head: Handle
