"""Writes a random Qwen 3.5 GGUF of any size's real shapes, for tests and for timing.

    python -m benchmarks.make_model --size 27b --mix q4_k_m /tmp/random-27b.gguf

The values are random but sane: logits stay finite, gates open and close, slow and fast decays
occur. Speed, memory and arithmetic are those of the real thing; the text is not.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from benchmarks.gguf_writer import StoredTensor, num_bytes, write_gguf
from benchmarks.model_sizes import SIZES, ModelSizes
from benchmarks.random_tensors import F32, GivenTensor, RandomTensor
from benchmarks.synthetic_vocabulary import vocabulary_metadata

Format = GGMLQuantizationType
FALLBACKS = {
    Format.Q2_K: Format.IQ4_NL,
    Format.Q3_K: Format.IQ4_NL,
    Format.Q4_K: Format.Q5_0,
    Format.Q5_K: Format.Q5_1,
    Format.Q6_K: Format.Q8_0,
    Format.IQ4_XS: Format.IQ4_NL,
}
"""What llama.cpp's quantiser takes for rows that are not whole blocks of 256."""


class Mix:
    """Which format each matrix gets: `q4_k_m`, `iq4_xs`, `mxfp4_moe`, or one format for all."""

    def __init__(self, name: str, sizes: ModelSizes) -> None:
        self.name = name.upper()
        self.sizes = sizes

    def format(self, tensor: str, layer: int, columns: int) -> Format:
        """The format of a matrix, from the last part of its name; `layer` -1 is outside all."""
        chosen = self._wanted(tensor, layer)
        if columns % GGML_QUANT_SIZES[chosen][0]:
            chosen = FALLBACKS.get(chosen, chosen)
        return chosen if columns % GGML_QUANT_SIZES[chosen][0] == 0 else F32

    def _wanted(self, tensor: str, layer: int) -> Format:
        if self.name == "Q4_K_M":
            return self._q4_k_m(tensor, layer)
        if self.name == "IQ4_XS":
            return Format.Q6_K if self._is_head(tensor) else Format.IQ4_XS
        if self.name == "MXFP4_MOE":
            return Format.MXFP4 if tensor.endswith("_exps") else Format.Q8_0
        return Format[self.name]

    def _q4_k_m(self, tensor: str, layer: int) -> Format:
        """The counts of published files of 2026."""
        if self._is_head(tensor):
            return Format.Q6_K
        if tensor == "attn_qkv":
            return Format.Q5_K
        if tensor in ("ffn_down", "ffn_down_exps") and self._more_bits(layer):
            return Format.Q6_K
        # The quantiser counts attention layers here, but as if all layers were such.
        if tensor == "attn_v" and self._more_bits(layer // self.sizes.interval):
            return Format.Q6_K
        return Format.Q4_K

    def _is_head(self, tensor: str) -> bool:
        return tensor == ("token_embd" if self.sizes.tied else "output")

    def _more_bits(self, layer: int) -> bool:
        eighth = self.sizes.layers // 8
        return layer < eighth or layer >= 7 * self.sizes.layers // 8 or (layer - eighth) % 3 == 2


class _Plan:
    """Every tensor of a model, in the order of the file."""

    def __init__(self, sizes: ModelSizes, mix: str, seed: int) -> None:
        self.sizes = sizes
        self.mix = Mix(mix, sizes)
        self.seed = seed

    def tensors(self) -> Iterator[StoredTensor]:
        sizes = self.sizes
        yield self.matrix("token_embd", sizes.vocab, sizes.hidden)
        for layer in range(sizes.layers + sizes.mtp):
            yield from self.block(layer)
        yield self.norm("output_norm", sizes.hidden)
        if not sizes.tied:
            yield self.matrix("output", sizes.vocab, sizes.hidden)

    def block(self, layer: int) -> Iterator[StoredTensor]:
        sizes = self.sizes
        yield self.norm(f"blk.{layer}.attn_norm", sizes.hidden)
        yield from self.attention(layer) if sizes.is_attention(layer) else self.delta_net(layer)
        yield self.norm(f"blk.{layer}.post_attention_norm", sizes.hidden)
        yield from self.experts(layer) if sizes.experts else self.dense(layer)
        if layer >= sizes.layers:
            yield self.matrix(f"blk.{layer}.nextn.eh_proj", sizes.hidden, 2 * sizes.hidden)
            for name in ("enorm", "hnorm", "shared_head_norm"):
                yield self.norm(f"blk.{layer}.nextn.{name}", sizes.hidden)

    def delta_net(self, layer: int) -> Iterator[StoredTensor]:
        sizes, prefix = self.sizes, f"blk.{layer}."
        rng = np.random.default_rng([self.seed, layer])
        # Mamba's initialisation: time constants between a token and a thousand tokens.
        rates = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), sizes.v_heads))
        decays = -rng.uniform(1, 16, sizes.v_heads)
        yield self.matrix(prefix + "attn_qkv", sizes.conv_dim, sizes.hidden)
        yield self.matrix(prefix + "attn_gate", sizes.value_size, sizes.hidden)
        yield self.matrix(prefix + "ssm_beta", sizes.v_heads, sizes.hidden)
        yield self.matrix(prefix + "ssm_alpha", sizes.v_heads, sizes.hidden)
        yield self.plain(prefix + "ssm_conv1d.weight", (sizes.conv_dim, sizes.conv_width), 0.5)
        yield GivenTensor(name=prefix + "ssm_a", values=decays.astype(np.float32))
        yield GivenTensor(
            name=prefix + "ssm_dt.bias", values=np.log(np.expm1(rates)).astype(np.float32)
        )
        yield self.norm(prefix + "ssm_norm", sizes.state_dim)
        yield self.matrix(prefix + "ssm_out", sizes.hidden, sizes.value_size)

    def attention(self, layer: int) -> Iterator[StoredTensor]:
        sizes, prefix = self.sizes, f"blk.{layer}."
        kv_rows = sizes.kv_heads * sizes.head_dim
        q_columns = sizes.q_heads * sizes.head_dim
        yield self.matrix(prefix + "attn_q", 2 * q_columns, sizes.hidden)
        yield self.matrix(prefix + "attn_k", kv_rows, sizes.hidden)
        yield self.matrix(prefix + "attn_v", kv_rows, sizes.hidden)
        yield self.norm(prefix + "attn_q_norm", sizes.head_dim)
        yield self.norm(prefix + "attn_k_norm", sizes.head_dim)
        yield self.matrix(prefix + "attn_output", sizes.hidden, q_columns)

    def dense(self, layer: int) -> Iterator[StoredTensor]:
        hidden, width = self.sizes.hidden, self.sizes.dense_dim
        yield self.matrix(f"blk.{layer}.ffn_gate", width, hidden)
        yield self.matrix(f"blk.{layer}.ffn_up", width, hidden)
        yield self.matrix(f"blk.{layer}.ffn_down", hidden, width)

    def experts(self, layer: int) -> Iterator[StoredTensor]:
        sizes, prefix = self.sizes, f"blk.{layer}."
        hidden, count, width = sizes.hidden, sizes.experts, sizes.expert_dim
        yield self.plain(prefix + "ffn_gate_inp.weight", (count, hidden), hidden**-0.5)
        yield self.matrix(prefix + "ffn_gate_exps", count, width, hidden)
        yield self.matrix(prefix + "ffn_up_exps", count, width, hidden)
        yield self.matrix(prefix + "ffn_down_exps", count, hidden, width)
        if sizes.shared_dim:
            yield self.plain(prefix + "ffn_gate_inp_shexp.weight", (hidden,), hidden**-0.5)
            yield self.matrix(prefix + "ffn_gate_shexp", sizes.shared_dim, hidden)
            yield self.matrix(prefix + "ffn_up_shexp", sizes.shared_dim, hidden)
            yield self.matrix(prefix + "ffn_down_shexp", hidden, sizes.shared_dim)

    def matrix(self, name: str, *shape: int) -> RandomTensor:
        _, _, rest = name.rpartition("blk.")
        layer, _, last = rest.partition(".") if "." in rest else ("-1", "", rest)
        format = self.mix.format(last, int(layer), shape[-1])
        # A row's product with a normed vector then has a standard deviation near one.
        std = shape[-1] ** -0.5
        return RandomTensor(
            name=name + ".weight", shape=shape, format=format, std=std, seed=self.seed
        )

    def norm(self, name: str, size: int) -> RandomTensor:
        return self.plain(name + ".weight", (size,), std=0.2, mean=1.0)

    def plain(
        self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0
    ) -> RandomTensor:
        return RandomTensor(name=name, shape=shape, format=F32, std=std, mean=mean, seed=self.seed)


def plan_tensors(sizes: ModelSizes, mix: str, seed: int = 0) -> list[StoredTensor]:
    """All tensors of a model; nothing is drawn yet."""
    return list(_Plan(sizes, mix, seed).tensors())


def architecture_metadata(sizes: ModelSizes, name: str) -> dict[str, Any]:
    """The keys that describe the model; none about text."""
    architecture = "qwen35moe" if sizes.experts else "qwen35"
    num_blocks = sizes.layers + sizes.mtp
    own: dict[str, Any] = {
        "block_count": num_blocks,
        "context_length": sizes.context,
        "embedding_length": sizes.hidden,
        "attention.head_count": sizes.q_heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": sizes.rope_dim,
        "rope.dimension_sections": _rope_sections(sizes.rope_dim),
        "rope.freq_base": 1e7,
        "full_attention_interval": sizes.interval,
        "ssm.conv_kernel": sizes.conv_width,
        "ssm.state_size": sizes.state_dim,
        "ssm.group_count": sizes.k_heads,
        "ssm.time_step_rank": sizes.v_heads,
        "ssm.inner_size": sizes.value_size,
    }
    own |= _experts_metadata(sizes) if sizes.experts else {"feed_forward_length": sizes.dense_dim}
    if sizes.mtp:
        own["nextn_predict_layers"] = 1
    general = {"general.architecture": architecture, "general.name": name}
    return general | {f"{architecture}.{key}": value for key, value in own.items()}


def _experts_metadata(sizes: ModelSizes) -> dict[str, Any]:
    metadata = {
        "expert_count": sizes.experts,
        "expert_used_count": sizes.experts_used,
        "expert_feed_forward_length": sizes.expert_dim,
    }
    if sizes.shared_dim:
        metadata["expert_shared_feed_forward_length"] = sizes.shared_dim
    return metadata


def _rope_sections(rope_dim: int) -> list[int]:
    """Pairs by axis: time, height, width; [11, 11, 10, 0] for 64 rotated dims."""
    pairs = rope_dim // 2
    width = pairs // 3
    height = (pairs - width) // 2
    return [pairs - width - height, height, width, 0]


def make_model(
    path: Path, sizes: ModelSizes, mix: str, seed: int = 0, has_data: bool = True
) -> int:
    """Write a model with a vocabulary and a chat template; its size in bytes."""
    name = f"Random {path.stem}"
    metadata = architecture_metadata(sizes, name) | vocabulary_metadata(sizes.vocab)
    tensors = plan_tensors(sizes, mix, seed)
    write_gguf(path, metadata, tensors, has_data=has_data)
    return sum(map(num_bytes, tensors))


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="make_model", description="Write a random GGUF model.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny-dense")
    parser.add_argument(
        "--mix", default="q4_k_m", help="q4_k_m, iq4_xs, mxfp4_moe, or a format: bf16, q8_0, …"
    )
    parser.add_argument("--mtp", action="store_true", help="with a multi-token-prediction block")
    parser.add_argument("--vocab", type=int, help="rows of the embedding")
    parser.add_argument("--layers", type=int, help="fewer layers of the same shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-data", action="store_true", help="a hole in place of the weights, for `qwend check`"
    )
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    settings = (_asked_sizes(arguments), arguments.mix, arguments.seed, not arguments.no_data)
    written = make_model(arguments.path, *settings)
    elapsed = time.perf_counter() - began
    print(f"{arguments.path}: {written / 1e9:.2f} GB of tensors in {elapsed:.1f} s")


def _asked_sizes(arguments: argparse.Namespace) -> ModelSizes:
    fields = {name: getattr(SIZES[arguments.size], name) for name in ModelSizes.__struct_fields__}
    given = {"mtp": arguments.mtp, "vocab": arguments.vocab, "layers": arguments.layers}
    return ModelSizes(**fields | {name: value for name, value in given.items() if value})


if __name__ == "__main__":
    main()
