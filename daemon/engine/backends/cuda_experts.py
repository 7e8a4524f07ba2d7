"""Mixtures of experts on the GPU: routing, the chosen experts and the shared one.

Owns their workspace and the order of their launches: three a layer in decode, seven in prefill.
Engine thread only.
"""

from daemon.engine.model.shape import ExpertsShape, ModelShape
from daemon.engine.model.weights import ExpertWeights
from daemon.errors import UnsupportedModel
from daemon.kernels.moe_decode import MoeDecode
from daemon.kernels.moe_prefill import MoePrefill
from daemon.kernels.moe_route import MAX_EXPERTS, MAX_USED, MoeRoute, MoeSizes, RouteLists, RowLines
from daemon.kernels.quant_gemv import MAX_TOKENS
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType


class ExpertMixer:
    """Adds a layer's experts to the residual.

    Args:
        max_rows: of one prefill batch.

    Raises:
        UnsupportedModel: more experts than the kernels take.
    """

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        shape: ModelShape,
        experts: ExpertsShape,
        max_rows: int,
    ) -> None:
        _check(experts)
        sizes = _sizes(shape, experts)
        width = max(experts.expert_dim, experts.shared_dim)
        self._eps = shape.rms_eps
        self._num_experts = experts.num_experts
        self._route = MoeRoute(device, compiler, sizes, max_rows)
        self._decode = MoeDecode(device, compiler, sizes, width)
        self._prefill = MoePrefill(device, compiler, sizes, width, max_rows)
        self._lists = RouteLists.allocate(device, sizes)
        self._lines = RowLines.allocate(device, sizes, max_rows)
        self._panels = device.allocate((MAX_TOKENS, shape.hidden), ElementType.F16)

    def mix_few(self, weights: ExpertWeights, residual: DeviceArray) -> None:
        """Up to 16 rows, f32 `[rows, hidden]`."""
        self._route.few(
            residual, weights.norm, weights.router, self._panels, self._lists, self._eps
        )
        shared_gate_up, shared_down = weights.shared or (None, None)
        rows = residual.shape[0]
        self._decode.gate_up(weights.gate_up, shared_gate_up, self._panels, self._lists, rows)
        self._decode.down(weights.down, shared_down, self._lists, residual)

    def mix_many(self, weights: ExpertWeights, residual: DeviceArray) -> None:
        """The rows of a prefill batch, f32 `[rows, hidden]`."""
        lines = self._lines.of(residual.shape[0])
        self._route.many(residual, weights.norm, weights.router, lines, self._eps)
        shared_gate_up, shared_down = weights.shared or (None, None)
        gate = None
        if weights.shared is not None:
            gate = weights.router.rows(self._num_experts, self._num_experts + 1)
        self._prefill.mix(
            (weights.gate_up, shared_gate_up), (weights.down, shared_down),
            weights.norm, gate, lines, residual, self._eps,
        )  # fmt: skip


def _sizes(shape: ModelShape, experts: ExpertsShape) -> MoeSizes:
    return MoeSizes(
        experts.num_experts, experts.num_used, shape.hidden, has_shared=experts.shared_dim > 0
    )


def _check(experts: ExpertsShape) -> None:
    if experts.num_experts > MAX_EXPERTS or experts.num_used > MAX_USED:
        raise UnsupportedModel(
            f"the GPU kernels take up to {MAX_EXPERTS} experts, {MAX_USED} of them at once; "
            f"this model has {experts.num_experts} and uses {experts.num_used}"
        )
