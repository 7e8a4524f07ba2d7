"""The sizes of a Qwen 3.5 model, read from GGUF metadata. Nothing is hard-coded to one model.

Owns the meaning of the metadata keys; knows no tensors. Reference: the GGUF keys that llama.cpp
requires for the architectures `qwen35` and `qwen35moe`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from msgspec import Struct

from daemon.errors import ModelFileError, UnsupportedModel

ARCHITECTURES = ("qwen35", "qwen35moe")
LayerKind = Literal["delta_net", "attention"]
FAMILY_ROPE_BASE = 1e7
"""Of all Qwen 3.5 sizes; a file that leaves it out does not mean the old default of 10,000."""

MAX_SIZE = 2**24
MAX_LAYERS = 1024
"""Beyond any real model: a damaged file must not make the daemon allocate what it claims."""


class AttentionShape(Struct, frozen=True):
    """Gated full attention: sizes in heads and elements; `rope_dim` of `head_dim` rotate."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


class DeltaNetShape(Struct, frozen=True):
    """Gated delta net: value head h uses key head h mod `num_k_heads` (GGUF order)."""

    num_k_heads: int
    num_v_heads: int
    k_dim: int
    v_dim: int
    conv_width: int

    @property
    def key_size(self) -> int:
        """Elements of all key heads; as many as of all query heads."""
        return self.num_k_heads * self.k_dim

    @property
    def value_size(self) -> int:
        """Elements of all value heads."""
        return self.num_v_heads * self.v_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys, values."""
        return 2 * self.key_size + self.value_size


class ExpertsShape(Struct, frozen=True):
    """Mixture of experts with one shared expert; `shared_dim` 0: there is none."""

    num_experts: int
    num_used: int
    expert_dim: int
    shared_dim: int


class RopeShape(Struct, frozen=True):
    """Rotary frequencies, `[rope_dim / 2]` float64, and the magnitude of sine and cosine."""

    frequencies: tuple[float, ...]
    magnitude: float


class ModelShape(Struct, frozen=True, kw_only=True):
    """All sizes of one model. `layers` are the trunk only; multi-token-prediction follows it."""

    architecture: str
    name: str
    context_length: int
    hidden: int
    vocab_size: int
    rms_eps: float
    layers: tuple[LayerKind, ...]
    attention: AttentionShape
    delta_net: DeltaNetShape
    rope: RopeShape
    dense_dim: int
    experts: ExpertsShape | None

    @property
    def num_delta_layers(self) -> int:
        """Layers with a recurrent state."""
        return self.layers.count("delta_net")

    @property
    def num_attention_layers(self) -> int:
        """Layers with a KV cache."""
        return self.layers.count("attention")


def read_shape(metadata: Mapping[str, Any], vocab_size: int) -> ModelShape:
    """Sizes from GGUF metadata; `vocab_size` is the row count of the embedding.

    Raises:
        UnsupportedModel: another architecture, or sizes that this engine cannot run.
        ModelFileError: a required key is missing or makes no sense.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architecture {architecture!r} is not supported; qwend serves Qwen 3.5, 3.6 and 3.8 "
            f"files ({', '.join(ARCHITECTURES)})"
        )
    keys = _Keys(metadata, architecture)
    layers = _read_layers(keys)
    attention = _read_attention(keys, layers)
    return ModelShape(
        architecture=architecture,
        name=str(metadata.get("general.name", architecture)),
        context_length=keys.integer("context_length"),
        hidden=keys.integer("embedding_length"),
        vocab_size=vocab_size,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layers=layers,
        attention=attention,
        delta_net=_read_delta_net(keys),
        rope=_read_rope(keys, attention.rope_dim),
        dense_dim=0 if architecture == "qwen35moe" else keys.integer("feed_forward_length"),
        experts=_read_experts(keys) if architecture == "qwen35moe" else None,
    )


class _Keys:
    """Typed access to the keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ModelFileError(
                f"metadata {self.architecture}.{key} is missing"
                if value is None
                else f"metadata {self.architecture}.{key} is {value!r}, not a positive number"
            )
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not value <= MAX_SIZE or value != int(value):
            raise ModelFileError(f"metadata {self.architecture}.{key} is {value}, not a size")
        return int(value)

    def optional_integer(self, key: str) -> int:
        """0 when it is absent or says 0."""
        value = self.get(key, 0)
        return 0 if type(value) is int and value == 0 else self.integer(key)

    def per_attention_layer(self, key: str, layers: tuple[LayerKind, ...]) -> int:
        """One value for all attention layers; newer files may give an array over all layers."""
        if not isinstance(self.get(key), np.ndarray | list):
            return self.integer(key)
        counts = self.per_block(key)
        used = {n for n, kind in zip(counts, layers, strict=False) if kind == "attention"}
        if len(used) != 1 or not 1 <= min(used) <= MAX_SIZE:
            raise UnsupportedModel(f"{self.architecture}.{key} differs between layers: {counts}")
        return used.pop()

    def per_block(self, key: str) -> list[int]:
        """An array of integers or flags."""
        value = self.get(key)
        values = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(values, list) or not all(isinstance(item, int) for item in values):
            raise ModelFileError(f"metadata {self.architecture}.{key} is not an array of integers")
        return values


def _read_layers(keys: _Keys) -> tuple[LayerKind, ...]:
    num_layers = keys.integer("block_count") - keys.optional_integer("nextn_predict_layers")
    if num_layers < 1:
        raise ModelFileError("the file has no trunk layers (a drafter file?); it cannot be served")
    if num_layers > MAX_LAYERS:
        raise ModelFileError(f"the file claims {num_layers} layers")
    if keys.get("attention.recurrent_layers") is None:
        interval = keys.integer("full_attention_interval", 4)
        recurrent = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    else:
        recurrent = keys.per_block("attention.recurrent_layers")
    if len(recurrent) < num_layers:
        raise ModelFileError(f"attention.recurrent_layers has {len(recurrent)} of {num_layers}")
    kinds: tuple[LayerKind, ...] = tuple(
        "delta_net" if recurrent[i] else "attention" for i in range(num_layers)
    )
    if len(set(kinds)) != 2:
        raise UnsupportedModel("a model needs both delta-net and attention layers")
    return kinds


def _read_attention(keys: _Keys, layers: tuple[LayerKind, ...]) -> AttentionShape:
    shape = AttentionShape(
        num_heads=keys.per_attention_layer("attention.head_count", layers),
        num_kv_heads=keys.per_attention_layer("attention.head_count_kv", layers),
        head_dim=keys.integer("attention.key_length"),
        rope_dim=keys.integer("rope.dimension_count", keys.integer("attention.key_length") // 4),
    )
    if keys.integer("attention.value_length", shape.head_dim) != shape.head_dim:
        raise UnsupportedModel("key and value heads of different sizes are not supported")
    if shape.num_heads % shape.num_kv_heads:
        raise ModelFileError(f"{shape.num_heads} query heads over {shape.num_kv_heads} KV heads")
    if shape.rope_dim % 2 or shape.rope_dim > shape.head_dim:
        raise ModelFileError(f"rope.dimension_count {shape.rope_dim} of {shape.head_dim}")
    return shape


def _read_delta_net(keys: _Keys) -> DeltaNetShape:
    num_v_heads = keys.integer("ssm.time_step_rank")
    inner = keys.integer("ssm.inner_size")
    shape = DeltaNetShape(
        num_k_heads=keys.integer("ssm.group_count"),
        num_v_heads=num_v_heads,
        k_dim=keys.integer("ssm.state_size"),
        v_dim=inner // num_v_heads,
        conv_width=keys.integer("ssm.conv_kernel"),
    )
    if inner % num_v_heads or num_v_heads % shape.num_k_heads or shape.conv_width < 2:
        raise ModelFileError(f"delta-net sizes do not fit together: {shape}")
    return shape


def _read_experts(keys: _Keys) -> ExpertsShape:
    shape = ExpertsShape(
        num_experts=keys.integer("expert_count"),
        num_used=keys.integer("expert_used_count"),
        expert_dim=keys.integer("expert_feed_forward_length"),
        shared_dim=keys.optional_integer("expert_shared_feed_forward_length"),
    )
    if shape.num_used > shape.num_experts:
        raise ModelFileError(f"{shape.num_used} of {shape.num_experts} experts used")
    return shape


def _read_rope(keys: _Keys, rope_dim: int) -> RopeShape:
    """Plain, linear or YaRN-scaled frequencies (arXiv 2309.00071, equations 17 to 22)."""
    theta = keys.number("rope.freq_base", FAMILY_ROPE_BASE)
    if theta <= 1:
        raise ModelFileError(f"rope.freq_base is {theta}, not above one")
    frequencies = theta ** -(np.arange(0, rope_dim, 2) / rope_dim)
    scaling = keys.get("rope.scaling.type", "none")
    if scaling == "none":
        return RopeShape(tuple(frequencies.tolist()), 1.0)
    factor = keys.number("rope.scaling.factor")
    if factor < 1:
        raise ModelFileError(f"rope.scaling.factor is {factor}, below one")
    if scaling == "linear":
        return RopeShape(tuple((frequencies / factor).tolist()), 1.0)
    if scaling != "yarn":
        raise UnsupportedModel(f"rope scaling {scaling!r} is not supported")
    keep = _yarn_kept_share(keys, rope_dim, theta)
    magnitude = keys.number("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0)
    return RopeShape(tuple((frequencies * (keep + (1 - keep) / factor)).tolist()), magnitude)


def _yarn_kept_share(keys: _Keys, rope_dim: int, theta: float) -> np.ndarray[Any, Any]:
    """Share of each frequency that is kept as it is: 1 for fast pairs, 0 for slow ones."""
    original = keys.number("rope.scaling.original_context_length")

    def pair_of(rotations: float) -> float:
        wavelengths = math.log(original) - math.log(rotations) - math.log(2 * math.pi)
        return rope_dim * wavelengths / (2 * math.log(theta))

    fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    low = max(math.floor(pair_of(fast)), 0)
    high = min(math.ceil(pair_of(slow)), rope_dim - 1)
    ramp = (np.arange(rope_dim // 2) - low) / max(high - low, 0.001)
    return np.asarray(1.0 - np.clip(ramp, 0.0, 1.0))
