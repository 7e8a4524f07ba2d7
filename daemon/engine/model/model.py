"""The model as a description: embedding, blocks, head. Dense and mixture of experts alike.

x = x + Mixer(RMSNorm(x)); x = x + FeedForward(RMSNorm(x)). The mixer of most layers is a gated
delta net, of every fourth gated attention. Knows no device: each operation is the backend's.
"""

from typing import Literal

from msgspec import Struct

from daemon.engine.backends.backend import Array, Backend, Run
from daemon.engine.batch import Batch
from daemon.engine.model.shape import ModelShape
from daemon.engine.model.weights import (
    AttentionWeights,
    DeltaNetWeights,
    DenseWeights,
    ExpertWeights,
    ModelWeights,
)


class Model(Struct, frozen=True):
    """Weights and sizes of one model on one backend."""

    shape: ModelShape
    weights: ModelWeights
    backend: Backend

    def logits(self, batch: Batch, rows: Literal["last", "all"] = "last") -> Array:
        """Evaluate: `[rows, vocab]`, of the last token of spans that sample, or of every token."""
        return self.backend.evaluate(batch, lambda run: self._forward(run, rows))

    def _forward(self, run: Run, rows: Literal["last", "all"]) -> Array:
        backend, weights = self.backend, self.weights
        x = backend.embed(run, weights.embedding)
        num_mixed = {"delta_net": 0, "attention": 0}
        for kind, layer in zip(self.shape.layers, weights.layers, strict=True):
            x = self._mix(run, num_mixed[kind], layer.mixer, x)
            x = self._feed_forward(layer.feed_forward, x)
            num_mixed[kind] += 1
        return backend.logits(run, weights.norm, weights.head, x, rows)

    def _mix(
        self, run: Run, layer: int, weights: DeltaNetWeights | AttentionWeights, x: Array
    ) -> Array:
        backend = self.backend
        projected = backend.project(weights.project, backend.rms_norm(x, weights.norm))
        if isinstance(weights, DeltaNetWeights):
            mixed = backend.delta_net(run, layer, weights, projected)
        else:
            mixed = backend.attention(run, layer, weights, projected)
        return backend.add_project(weights.out, mixed, x)

    def _feed_forward(self, weights: DenseWeights | ExpertWeights, x: Array) -> Array:
        backend = self.backend
        if isinstance(weights, ExpertWeights):
            return backend.mix_experts(weights, x)
        hidden = backend.project_gated(weights.gate_up, backend.rms_norm(x, weights.norm))
        return backend.add_project(weights.down, hidden, x)
