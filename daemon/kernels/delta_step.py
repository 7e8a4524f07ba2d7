"""Launches `delta_step.cu`: one decoded token of each sequence through a gated delta net layer."""

from __future__ import annotations

from pathlib import Path

from daemon.kernels.delta_state import (
    HEAD_DIM,
    DeltaConstants,
    DeltaInputs,
    DeltaSizes,
    DeltaSlots,
    DeltaTypes,
)
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 13 + ("int32",) * 3 + ("int64",) * 2 + ("int32",) * 2 + ("float32",)
ROWS_PER_THREAD = 8


def splits(arch: str) -> int:
    """Blocks per head; they exchange sums within a cluster, which Hopper and later have."""
    return 4 if arch in ("sm_90a", "sm_120") else 1


def defines(arch: str, types: DeltaTypes) -> dict[str, str | int]:
    """Macros of one variant; the same for every batch size, so that bits do not depend on it."""
    return {**types.defines, "SPLITS": splits(arch), "ROWS_PER_THREAD": ROWS_PER_THREAD}


class DeltaStep:
    """The kernel for one model."""

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        sizes: DeltaSizes,
        types: DeltaTypes,
        norm_eps: float,
    ) -> None:
        self._splits = splits(device.arch)
        cubin = compiler.cubin(SOURCE, defines(device.arch, types))
        self._kernel = Module(cubin).kernel("delta_step", PARAMETERS)
        self._stream = device.stream
        self._sizes = sizes
        self._norm_eps = norm_eps

    def __call__(
        self,
        inputs: DeltaInputs,
        constants: DeltaConstants,
        states: DeltaSlots,
        layer: int,
        slots: DeviceArray,
        captures: DeviceArray,
        positions: DeviceArray,
        output: DeviceArray,
        dependent: bool = False,
    ) -> None:
        """Advance the slots by one token each.

        Args:
            slots: i32 `[sequences]`; -1 leaves a row out, and its output as it was.
            captures: i32 `[sequences]`, a slot that also gets the new state, or -1.
            positions: i32 `[sequences]` of the tokens.
            output: `[sequences, v_heads * 128]`, written.
            dependent: start before the previous kernel has ended. Slots, captures and positions
                must then have been written at least two launches before.
        """
        (num_sequences,) = slots.shape
        sizes = self._sizes
        assert captures.shape == positions.shape == slots.shape
        assert output.shape[0] >= num_sequences
        assert output.shape[1:] == (sizes.value_size,)
        rules, rule_stride = states.rules(layer)
        rings, ring_stride = states.rings(layer)
        threads = HEAD_DIM * HEAD_DIM // (4 * ROWS_PER_THREAD * self._splits)
        self._kernel.launch(
            self._stream,
            (self._splits, sizes.num_v_heads, num_sequences),
            (threads, 1, 1),
            *(inputs.qkv.address, inputs.z.address, inputs.gates.address),
            *constants,
            *(rules, rings, slots, captures, positions, output),
            *(inputs.qkv.stride, inputs.z.stride, inputs.gates.stride),
            *(rule_stride, ring_stride),
            *(sizes.num_k_heads, sizes.num_v_heads, self._norm_eps),
            cluster=(self._splits, 1, 1) if self._splits > 1 else None,
            dependent=dependent,
        )
