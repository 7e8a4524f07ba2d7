"""From tensor names to a model: what must be there, in which shape, and what belongs together.

Owns the names of GGUF tensors. Knows no device: the backend makes the handles.
"""

from collections.abc import Callable, Iterable

from daemon.engine.backends.backend import Backend
from daemon.engine.model.model import Model
from daemon.engine.model.shape import ExpertsShape, ModelShape, read_shape
from daemon.engine.model.weights import (
    AttentionWeights,
    DeltaNetWeights,
    DenseWeights,
    ExpertWeights,
    Handle,
    LayerWeights,
    ModelWeights,
)
from daemon.engine.weights.gguf import GGUFFile, Tensor
from daemon.errors import TensorError, UnsupportedModel


def model_shape(file: GGUFFile) -> ModelShape:
    """Sizes of the model in a file; cheap, reads no tensor data.

    Raises:
        ModelFileError, UnsupportedModel, TensorError: see `read_shape`.
    """
    embedding = file.tensors.get("token_embd.weight")
    num_rows = embedding.shape[0] if embedding is not None else 0
    shape = read_shape(file.metadata, vocab_size=num_rows)
    if embedding is None:
        raise TensorError("tensor token_embd.weight is missing")
    return shape


def load_model(
    file: GGUFFile, backend: Backend, report: Callable[[Tensor], None] = lambda _: None
) -> Model:
    """Check all tensors of the trunk and hand them to the backend, which copies them.

    A multi-token-prediction block after the trunk is left alone.

    Args:
        report: gets each tensor that is loaded, in order.

    Raises:
        TensorError: a tensor is missing or has the wrong shape; the first such is named.
        UnsupportedModel: a format that cannot be read.
    """
    shape = model_shape(file)
    return Model(shape, _Loader(file, shape, backend, report).model_weights(), backend)


class _Loader:
    def __init__(
        self,
        file: GGUFFile,
        shape: ModelShape,
        backend: Backend,
        report: Callable[[Tensor], None],
    ) -> None:
        self.file = file
        self.shape = shape
        self.backend = backend
        self.report = report

    def model_weights(self) -> ModelWeights:
        hidden, vocab = self.shape.hidden, self.shape.vocab_size
        table = self.tensor("token_embd.weight", vocab, hidden)
        if "output.weight" in self.file.tensors:
            embedding = self.backend.table(table)
            head = self.backend.matrix([self.tensor("output.weight", vocab, hidden)])
        else:
            embedding, head = self.backend.tied_table(table)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(self.layer(i) for i in range(len(self.shape.layers))),
            norm=self.vector("output_norm.weight", hidden),
            head=head,
        )

    def layer(self, index: int) -> LayerWeights:
        prefix = f"blk.{index}."
        is_delta_net = self.shape.layers[index] == "delta_net"
        mixer = self.delta_net(prefix) if is_delta_net else self.attention(prefix)
        if self.shape.experts is None:
            return LayerWeights(mixer, self.dense(prefix))
        return LayerWeights(mixer, self.experts(prefix, self.shape.experts))

    def delta_net(self, prefix: str) -> DeltaNetWeights:
        hidden, sizes = self.shape.hidden, self.shape.delta_net
        num_heads = sizes.num_v_heads
        return DeltaNetWeights(
            norm=self.vector(prefix + "attn_norm.weight", hidden),
            project=self.backend.matrix(
                [
                    self.tensor(prefix + "attn_qkv.weight", sizes.conv_dim, hidden),
                    self.tensor(prefix + "attn_gate.weight", sizes.value_size, hidden),
                    self.tensor(prefix + "ssm_beta.weight", num_heads, hidden),
                    self.tensor(prefix + "ssm_alpha.weight", num_heads, hidden),
                ]
            ),
            conv=self.vector(prefix + "ssm_conv1d.weight", sizes.conv_dim, sizes.conv_width),
            decay=self.vector(prefix + "ssm_a", num_heads),
            dt_bias=self.vector(prefix + "ssm_dt.bias", num_heads),
            gated_norm=self.vector(prefix + "ssm_norm.weight", sizes.v_dim),
            out=self.matrix(prefix + "ssm_out.weight", hidden, sizes.value_size),
        )

    def attention(self, prefix: str) -> AttentionWeights:
        hidden, sizes = self.shape.hidden, self.shape.attention
        head_dim = sizes.head_dim
        q_rows = sizes.num_heads * 2 * head_dim
        kv_rows = sizes.num_kv_heads * head_dim
        fused = prefix + "attn_qkv.weight"
        if fused in self.file.tensors:
            parts = [self.tensor(fused, q_rows + 2 * kv_rows, hidden)]
        else:
            parts = [
                self.tensor(prefix + "attn_q.weight", q_rows, hidden),
                self.tensor(prefix + "attn_k.weight", kv_rows, hidden),
                self.tensor(prefix + "attn_v.weight", kv_rows, hidden),
            ]
        return AttentionWeights(
            norm=self.vector(prefix + "attn_norm.weight", hidden),
            project=self.backend.matrix(parts),
            q_norm=self.vector(prefix + "attn_q_norm.weight", head_dim),
            k_norm=self.vector(prefix + "attn_k_norm.weight", head_dim),
            out=self.matrix(prefix + "attn_output.weight", hidden, sizes.num_heads * head_dim),
        )

    def dense(self, prefix: str) -> DenseWeights:
        hidden, width = self.shape.hidden, self.shape.dense_dim
        return DenseWeights(
            norm=self.vector(prefix + "post_attention_norm.weight", hidden),
            gate_up=self.backend.gated_matrix(
                self.tensor(prefix + "ffn_gate.weight", width, hidden),
                self.tensor(prefix + "ffn_up.weight", width, hidden),
            ),
            down=self.matrix(prefix + "ffn_down.weight", hidden, width),
        )

    def experts(self, prefix: str, sizes: ExpertsShape) -> ExpertWeights:
        hidden, count, width = self.shape.hidden, sizes.num_experts, sizes.expert_dim
        fused = prefix + "ffn_gate_up_exps.weight"
        if fused in self.file.tensors:
            gate_up = [self.tensor(fused, count, 2 * width, hidden)]
        else:
            gate_up = [
                self.tensor(prefix + "ffn_gate_exps.weight", count, width, hidden),
                self.tensor(prefix + "ffn_up_exps.weight", count, width, hidden),
            ]
        router = [self.tensor(prefix + "ffn_gate_inp.weight", count, hidden)]
        if sizes.shared_dim:
            gate = self.any_shape(prefix + "ffn_gate_inp_shexp.weight", [(hidden,), (1, hidden)])
            router.append(_reshaped(gate, 1, hidden))
        return ExpertWeights(
            norm=self.vector(prefix + "post_attention_norm.weight", hidden),
            router=self.backend.router(router),
            gate_up=self.backend.gated_experts(gate_up),
            down=self.backend.experts(
                self.tensor(prefix + "ffn_down_exps.weight", count, hidden, width)
            ),
            shared=self.shared_expert(prefix, sizes) if sizes.shared_dim else None,
        )

    def shared_expert(self, prefix: str, sizes: ExpertsShape) -> tuple[Handle, Handle]:
        hidden, width = self.shape.hidden, sizes.shared_dim
        gate_up = [
            _reshaped(self.tensor(prefix + name, width, hidden), 1, width, hidden)
            for name in ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")
        ]
        down = self.tensor(prefix + "ffn_down_shexp.weight", hidden, width)
        return (
            self.backend.gated_experts(gate_up),
            self.backend.experts(_reshaped(down, 1, hidden, width)),
        )

    def matrix(self, name: str, rows: int, columns: int) -> Handle:
        return self.backend.matrix([self.tensor(name, rows, columns)])

    def vector(self, name: str, *shape: int) -> Handle:
        return self.backend.vector(self.tensor(name, *shape))

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.any_shape(name, [shape])

    def any_shape(self, name: str, shapes: Iterable[tuple[int, ...]]) -> Tensor:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise TensorError(f"tensor {name} is missing")
        if tensor.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise TensorError(f"tensor {name} has shape {tensor.shape}, expected {expected}")
        if not tensor.format.decodable:
            raise UnsupportedModel(
                f"tensor {name} has the format {tensor.format.name}, which is not supported"
            )
        self.report(tensor)
        return tensor


def _reshaped(tensor: Tensor, *shape: int) -> Tensor:
    return Tensor(tensor.name, shape, tensor.format, tensor.data)
