"""Launches `moe_route.cu`: experts and weights of each row, and the rows of each expert."""

from pathlib import Path

from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
ROUTE_PARAMETERS = ("pointer",) * 3 + ("int32",) * 2
GROUP_PARAMETERS = ("pointer",) * 3 + ("int32",)
WARPS = 4


def defines(num_experts: int, num_used: int) -> dict[str, str | int]:
    """Macros for a model's number of experts, and of experts a row uses."""
    assert num_experts % 32 == 0
    assert num_experts <= 1024
    assert 1 <= num_used <= 32
    return {"EXPERTS": num_experts, "USED": num_used}


class MoeRoute:
    """The kernels for one model's experts."""

    def __init__(self, device: Device, compiler: Compiler, num_experts: int, num_used: int) -> None:
        module = Module(compiler.cubin(SOURCE, defines(num_experts, num_used)))
        self._route = module.kernel("moe_route", ROUTE_PARAMETERS)
        self._group = module.kernel("moe_group", GROUP_PARAMETERS)
        self._stream = device.stream
        self._num_experts = num_experts

    def route(
        self,
        scores: DeviceArray,
        chosen: DeviceArray,
        weights: DeviceArray,
        dependent: bool = False,
    ) -> None:
        """Router logits f32 `[rows, experts]` (padding may follow) to the experts of each row.

        Args:
            chosen: i32 `[rows, used]`, written, best first; ties go to the lower index.
            weights: f32 `[rows, used]`, written; they sum to one.
        """
        rows = chosen.shape[0]
        grid, block = (-(-rows // WARPS), 1, 1), (WARPS * 32, 1, 1)
        self._route.launch(
            self._stream, grid, block, scores, chosen, weights, rows, scores.shape[1],
            dependent=dependent,
        )  # fmt: skip

    def group(
        self, chosen: DeviceArray, first: DeviceArray, pairs: DeviceArray, dependent: bool = False
    ) -> None:
        """The pairs `row * used + rank` by expert.

        Args:
            first: i32 `[experts + 1]`, written: expert e has `pairs[first[e]:first[e + 1]]`.
            pairs: i32 `[rows * used]`, written; in order within an expert.
        """
        assert pairs.size == chosen.size
        grid, block = (-(-self._num_experts // WARPS), 1, 1), (WARPS * 32, 1, 1)
        self._group.launch(
            self._stream, grid, block, chosen, first, pairs, chosen.size, dependent=dependent
        )
