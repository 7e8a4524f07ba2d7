"""The architecture once more, in float64 and plain loops: what a backend must equal.

Written from the published description of the model and of its GGUF files. Shares no code with the
daemon: the file is read by the `gguf` package, and every layer is spelled out again.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, quants

KeyHeadOf = Callable[[int, int, int], int]


def tiled(v_head: int, k_heads: int, v_heads: int) -> int:
    """GGUF's order: value heads walk over the key heads again and again."""
    return v_head % k_heads


def grouped(v_head: int, k_heads: int, v_heads: int) -> int:
    """The order of the original checkpoints, which is wrong for a GGUF file."""
    return v_head // (v_heads // k_heads)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(np.mean(x * x) + eps) * weight


class Float64Forward:
    """One sequence through one model; every call of `logits` feeds the next token."""

    def __init__(self, paths: Sequence[Path], key_head_of: KeyHeadOf = tiled) -> None:
        readers = [GGUFReader(path) for path in paths]
        self.fields = {name: field.contents() for name, field in readers[0].fields.items()}
        self.weights = {
            tensor.name: quants.dequantize(tensor.data, tensor.tensor_type)
            .astype(np.float64)
            .reshape(tuple(int(n) for n in reversed(tensor.shape)))
            for reader in readers
            for tensor in reader.tensors
        }
        self.architecture = self.fields["general.architecture"]
        self.key_head_of = key_head_of
        self.eps = self.key("attention.layer_norm_rms_epsilon")
        self.num_layers = self.key("block_count") - self.key("nextn_predict_layers", 0)
        self.frequencies, self.magnitude = self.rope_frequencies()
        self.position = 0
        self.memory: dict[tuple[int, str], Any] = {}

    def key(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{name}", default)

    def logits_of(self, tokens: Sequence[int]) -> np.ndarray:
        return np.stack([self.logits(int(token)) for token in tokens])

    def logits(self, token: int) -> np.ndarray:
        x = self.weights["token_embd.weight"][token].copy()
        for layer in range(self.num_layers):
            normed = rms_norm(x, self.weight(layer, "attn_norm.weight"), self.eps)
            x += self.mixer(layer, normed)
            normed = rms_norm(x, self.weight(layer, "post_attention_norm.weight"), self.eps)
            x += self.feed_forward(layer, normed)
        self.position += 1
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return head @ rms_norm(x, self.weights["output_norm.weight"], self.eps)

    def weight(self, layer: int, name: str) -> np.ndarray:
        return self.weights[f"blk.{layer}.{name}"]

    def has(self, layer: int, name: str) -> bool:
        return f"blk.{layer}.{name}" in self.weights

    def mixer(self, layer: int, u: np.ndarray) -> np.ndarray:
        return self.delta_net(layer, u) if self.has(layer, "ssm_a") else self.attention(layer, u)

    # ── gated delta net ───────────────────────────────────────────────────────────────────────

    def delta_net(self, layer: int, u: np.ndarray) -> np.ndarray:
        k_heads, v_heads = self.key("ssm.group_count"), self.key("ssm.time_step_rank")
        size = self.key("ssm.state_size")
        v_size = self.key("ssm.inner_size") // v_heads
        mixed = self.convolve(layer, self.weight(layer, "attn_qkv.weight") @ u)
        z = self.weight(layer, "attn_gate.weight") @ u
        beta = sigmoid(self.weight(layer, "ssm_beta.weight") @ u)
        a = self.weight(layer, "ssm_alpha.weight") @ u + self.weight(layer, "ssm_dt.bias")
        decay = np.exp(self.weight(layer, "ssm_a") * np.log1p(np.exp(a)))
        q_all = mixed[: k_heads * size].reshape(k_heads, size)
        k_all = mixed[k_heads * size : 2 * k_heads * size].reshape(k_heads, size)
        v_all = mixed[2 * k_heads * size :].reshape(v_heads, v_size)
        states = self.memory.setdefault((layer, "rule"), np.zeros((v_heads, size, v_size)))
        out = np.empty((v_heads, v_size))
        for head in range(v_heads):
            k_head = self.key_head_of(head, k_heads, v_heads)
            q, k, v = q_all[k_head], k_all[k_head], v_all[head]
            q = q / math.sqrt(q @ q + 1e-6) / math.sqrt(size)
            k = k / math.sqrt(k @ k + 1e-6)
            state = states[head] * decay[head]
            error = beta[head] * (v - state.T @ k)
            states[head] = state + np.outer(k, error)
            read = states[head].T @ q
            gate = silu(z[head * v_size : (head + 1) * v_size])
            out[head] = rms_norm(read, self.weight(layer, "ssm_norm.weight"), self.eps) * gate
        return self.weight(layer, "ssm_out.weight") @ out.reshape(-1)

    def convolve(self, layer: int, row: np.ndarray) -> np.ndarray:
        taps = self.weight(layer, "ssm_conv1d.weight")
        width = taps.shape[1]
        empty = [np.zeros_like(row)] * (width - 1)
        rows = [*self.memory.get((layer, "rows"), empty), row]
        self.memory[layer, "rows"] = rows[1:]
        return silu(sum(taps[:, j] * rows[j] for j in range(width)))

    # ── gated attention ───────────────────────────────────────────────────────────────────────

    def attention(self, layer: int, u: np.ndarray) -> np.ndarray:
        q_heads = self.of_layer("attention.head_count", layer)
        kv_heads = self.of_layer("attention.head_count_kv", layer)
        size = self.key("attention.key_length")
        queries, keys, values = self.project(layer, u, q_heads * 2 * size, kv_heads * size)
        past = self.memory.setdefault((layer, "kv"), [])
        rotated = [
            self.rotate(rms_norm(k, self.weight(layer, "attn_k_norm.weight"), self.eps))
            for k in keys.reshape(kv_heads, size)
        ]
        past.append((rotated, values.reshape(kv_heads, size)))
        out = []
        for head, rows in enumerate(queries.reshape(q_heads, 2 * size)):
            q = rms_norm(rows[:size], self.weight(layer, "attn_q_norm.weight"), self.eps)
            kv_head = head // (q_heads // kv_heads)
            k_rows = np.stack([k[kv_head] for k, _ in past])
            v_rows = np.stack([v[kv_head] for _, v in past])
            scores = k_rows @ self.rotate(q) / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            out.append((shares / shares.sum()) @ v_rows * sigmoid(rows[size:]))
        return self.weight(layer, "attn_output.weight") @ np.concatenate(out)

    def of_layer(self, name: str, layer: int) -> int:
        value = self.key(name)
        return int(value[layer]) if isinstance(value, list) else int(value)

    def project(
        self, layer: int, u: np.ndarray, q_rows: int, kv_rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.has(layer, "attn_qkv.weight"):
            rows = self.weight(layer, "attn_qkv.weight") @ u
            return rows[:q_rows], rows[q_rows : q_rows + kv_rows], rows[q_rows + kv_rows :]
        q, k, v = (self.weight(layer, f"attn_{which}.weight") @ u for which in "qkv")
        return q, k, v

    def rotate(self, x: np.ndarray) -> np.ndarray:
        half = len(self.frequencies)
        turned = x.copy()
        for i in range(half):
            angle = self.position * self.frequencies[i]
            cos, sin = math.cos(angle) * self.magnitude, math.sin(angle) * self.magnitude
            turned[i] = x[i] * cos - x[i + half] * sin
            turned[i + half] = x[i + half] * cos + x[i] * sin
        return turned

    def rope_frequencies(self) -> tuple[list[float], float]:
        dims = self.key("rope.dimension_count")
        theta = self.key("rope.freq_base")
        plain = [theta ** (-2 * i / dims) for i in range(dims // 2)]
        if self.key("rope.scaling.type", "none") != "yarn":
            return plain, 1.0
        factor = self.key("rope.scaling.factor")
        original = self.key("rope.scaling.original_context_length")

        def pair_turning(times: float) -> float:
            return dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair_turning(32)), 0), min(math.ceil(pair_turning(1)), dims - 1)
        scaled = []
        for i, frequency in enumerate(plain):
            slow = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
            scaled.append(frequency * (1 - slow) + frequency / factor * slow)
        return scaled, 0.1 * math.log(factor) + 1

    # ── feed-forward ──────────────────────────────────────────────────────────────────────────

    def feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        if not self.has(layer, "ffn_gate_inp.weight"):
            gate, up, down = (self.weight(layer, f"ffn_{n}.weight") for n in ("gate", "up", "down"))
            return down @ (silu(gate @ x) * (up @ x))
        return self.experts(layer, x) + self.shared_expert(layer, x)

    def experts(self, layer: int, x: np.ndarray) -> np.ndarray:
        scores = self.weight(layer, "ffn_gate_inp.weight") @ x
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        chosen = sorted(range(len(shares)), key=lambda e: -shares[e])
        chosen = chosen[: self.key("expert_used_count")]
        total = sum(shares[e] for e in chosen)
        out = np.zeros_like(x)
        for expert in chosen:
            gate, up = self.expert_gate_up(layer, expert)
            hidden = silu(gate @ x) * (up @ x)
            down = self.weight(layer, "ffn_down_exps.weight")[expert]
            out += shares[expert] / total * (down @ hidden)
        return out

    def expert_gate_up(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        if self.has(layer, "ffn_gate_up_exps.weight"):
            both = self.weight(layer, "ffn_gate_up_exps.weight")[expert]
            return both[: len(both) // 2], both[len(both) // 2 :]
        gate, up = (self.weight(layer, f"ffn_{which}_exps.weight") for which in ("gate", "up"))
        return gate[expert], up[expert]

    def shared_expert(self, layer: int, x: np.ndarray) -> np.ndarray:
        if not self.has(layer, "ffn_gate_inp_shexp.weight"):
            return np.zeros_like(x)
        router = self.weight(layer, "ffn_gate_inp_shexp.weight").reshape(-1)
        gate, up, down = (
            self.weight(layer, f"ffn_{which}_shexp.weight") for which in ("gate", "up", "down")
        )
        return sigmoid(router @ x) * (down @ (silu(gate @ x) * (up @ x)))
