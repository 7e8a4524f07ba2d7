"""Small random model files of every legal form, for tests. The numbers are make_model's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from benchmarks.gguf_writer import StoredTensor, write_gguf, write_split
from benchmarks.make_model import architecture_metadata, plan_tensors
from benchmarks.model_sizes import ModelSizes
from benchmarks.random_tensors import RandomTensor

SMALL_DENSE = ModelSizes(
    layers=4, hidden=64, dense_dim=96, q_heads=4, kv_heads=2, k_heads=2, v_heads=4, vocab=97,
    head_dim=32, rope_dim=8, state_dim=32, context=4096,
)  # fmt: skip
SMALL_MOE = ModelSizes(
    layers=4, hidden=64, q_heads=4, kv_heads=2, k_heads=2, v_heads=4, vocab=97, head_dim=32,
    rope_dim=8, state_dim=32, context=4096, experts=8, experts_used=3, expert_dim=32, shared_dim=48,
)  # fmt: skip
WHOLE_BLOCKS = ModelSizes(
    layers=2, interval=2, hidden=256, dense_dim=256, q_heads=2, kv_heads=1, k_heads=1, v_heads=2,
    vocab=64, head_dim=128, rope_dim=32, state_dim=128, context=4096,
)  # fmt: skip
"""Every row is a multiple of 256 values, so that each format can be used for each matrix."""


class Form(Struct, frozen=True, kw_only=True):
    """How a file says the same thing: all that converters vary."""

    fused_qkv: bool = False
    fused_gate_up: bool = False
    shared_router_row: bool = False
    recurrent_array: bool = False
    head_arrays: bool = False
    yarn: bool = False


PLAIN = Form()


def resized(sizes: ModelSizes, **changes: Any) -> ModelSizes:
    """The same model with some other sizes."""
    return msgspec.structs.replace(sizes, **changes)


def write_model(
    path: Path,
    sizes: ModelSizes,
    mix: str = "f32",
    form: Form = PLAIN,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
) -> Path:
    """One file."""
    write_gguf(path, model_metadata(sizes, form) | (extra or {}), tensors(sizes, mix, form, seed))
    return path


def write_split_model(path: Path, sizes: ModelSizes, num_parts: int) -> list[Path]:
    """Several files; the first one has no tensors, as converters can leave it."""
    planned = tensors(sizes, "f32", PLAIN, 0)
    size = -(-len(planned) // (num_parts - 1))
    parts = [planned[i : i + size] for i in range(0, len(planned), size)]
    return write_split(path, model_metadata(sizes), [[], *parts])


def model_metadata(sizes: ModelSizes, form: Form = PLAIN) -> dict[str, Any]:
    """The keys of a model in a form."""
    metadata = architecture_metadata(sizes, "Small")
    prefix = f"{metadata['general.architecture']}."
    blocks = range(sizes.layers + sizes.mtp)
    if form.recurrent_array:
        del metadata[prefix + "full_attention_interval"]
        metadata[prefix + "attention.recurrent_layers"] = [
            not sizes.is_attention(layer) for layer in blocks
        ]
    if form.head_arrays:
        for key, heads in (("head_count", sizes.q_heads), ("head_count_kv", sizes.kv_heads)):
            counts = [heads if sizes.is_attention(layer) else 0 for layer in blocks]
            metadata[f"{prefix}attention.{key}"] = np.asarray(counts, np.uint32)
    if form.yarn:
        metadata |= {
            prefix + "rope.scaling.type": "yarn",
            prefix + "rope.scaling.factor": 4.0,
            prefix + "rope.scaling.original_context_length": 64,
        }
    return metadata


def tensors(
    sizes: ModelSizes, mix: str = "f32", form: Form = PLAIN, seed: int = 0
) -> list[StoredTensor]:
    """The tensors of a model in a form."""
    planned = plan_tensors(sizes, mix, seed)
    if form.fused_qkv:
        for layer in filter(sizes.is_attention, range(sizes.layers)):
            names = [f"blk.{layer}.attn_{which}.weight" for which in "qkv"]
            planned = _stacked(planned, names, f"blk.{layer}.attn_qkv.weight", axis=0)
    if form.fused_gate_up:
        for layer in range(sizes.layers):
            names = [f"blk.{layer}.ffn_{which}_exps.weight" for which in ("gate", "up")]
            planned = _stacked(planned, names, f"blk.{layer}.ffn_gate_up_exps.weight", axis=1)
    if form.shared_router_row:
        planned = [
            msgspec.structs.replace(tensor, shape=(1, *tensor.shape))
            if tensor.name.endswith("ffn_gate_inp_shexp.weight")
            else tensor
            for tensor in planned
        ]
    return planned


def _stacked(
    planned: Sequence[StoredTensor], names: list[str], name: str, axis: int
) -> list[StoredTensor]:
    """With the named tensors replaced by one of their rows together, of new values."""
    parts = [tensor for tensor in planned if tensor.name in names]
    first = parts[0]
    assert isinstance(first, RandomTensor)
    assert len(parts) == len(names)
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    fused = msgspec.structs.replace(first, name=name, shape=tuple(shape))
    return [
        fused if tensor is first else tensor
        for tensor in planned
        if tensor.name not in names or tensor is first
    ]
