"""The sizes of the Qwen 3.5 family, and two tiny models of the same shape. Data only."""

from msgspec import Struct


class ModelSizes(Struct, frozen=True, kw_only=True):
    """What tells one size from another. `dense_dim` is unused with experts."""

    layers: int
    hidden: int
    dense_dim: int = 0
    q_heads: int
    kv_heads: int
    k_heads: int = 16
    v_heads: int
    vocab: int = 248_320
    tied: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_dim: int = 0
    shared_dim: int = 0
    head_dim: int = 256
    rope_dim: int = 64
    state_dim: int = 128
    conv_width: int = 4
    interval: int = 4
    context: int = 262_144
    mtp: bool = False

    @property
    def key_size(self) -> int:
        """Elements of all key heads of a delta-net layer."""
        return self.k_heads * self.state_dim

    @property
    def value_size(self) -> int:
        """Elements of all value heads of a delta-net layer."""
        return self.v_heads * self.state_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution."""
        return 2 * self.key_size + self.value_size

    def is_attention(self, layer: int) -> bool:
        """Whether a layer is full attention; the multi-token-prediction block always is."""
        return layer >= self.layers or (layer + 1) % self.interval == 0


def _dense(layers: int, hidden: int, dense_dim: int, heads: tuple[int, int, int]) -> ModelSizes:
    q_heads, kv_heads, v_heads = heads
    return ModelSizes(
        layers=layers,
        hidden=hidden,
        dense_dim=dense_dim,
        q_heads=q_heads,
        kv_heads=kv_heads,
        v_heads=v_heads,
        tied=hidden < 4096,
    )


def _moe(
    layers: int, hidden: int, q_heads: int, v_heads: int, experts: tuple[int, int, int]
) -> ModelSizes:
    num_experts, num_used, expert_dim = experts
    return ModelSizes(
        layers=layers,
        hidden=hidden,
        q_heads=q_heads,
        kv_heads=2,
        v_heads=v_heads,
        experts=num_experts,
        experts_used=num_used,
        expert_dim=expert_dim,
        shared_dim=expert_dim,
    )


TINY_DENSE = ModelSizes(
    layers=4, hidden=256, dense_dim=512, q_heads=4, kv_heads=2, k_heads=2, v_heads=4,
    vocab=8192, tied=True, context=32_768,
)  # fmt: skip
TINY_MOE = ModelSizes(
    layers=4, hidden=256, q_heads=4, kv_heads=2, k_heads=2, v_heads=4, vocab=8192,
    experts=16, experts_used=4, expert_dim=256, shared_dim=256, context=32_768,
)  # fmt: skip

SIZES = {
    "tiny-dense": TINY_DENSE,
    "tiny-moe": TINY_MOE,
    "0.8b": _dense(24, 1024, 3584, (8, 2, 16)),
    "2b": _dense(24, 2048, 6144, (8, 2, 16)),
    "4b": _dense(32, 2560, 9216, (16, 4, 32)),
    "9b": _dense(32, 4096, 12_288, (16, 4, 32)),
    "27b": _dense(64, 5120, 17_408, (24, 4, 48)),
    "35b-a3b": _moe(40, 2048, 16, 32, (256, 8, 512)),
    "122b-a10b": _moe(48, 3072, 32, 64, (256, 8, 1024)),
    "397b-a17b": _moe(60, 4096, 32, 64, (512, 10, 1024)),
}
