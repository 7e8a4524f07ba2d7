"""Launches `delta_step.cu`: one decoded token of each sequence through a gated delta net layer."""

from __future__ import annotations

from pathlib import Path

from daemon.kernels.delta_state import (
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
THREADS = 256


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
        cubin = compiler.cubin(SOURCE, types.defines)
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
        self._kernel.launch(
            self._stream,
            (sizes.num_v_heads, num_sequences, 1),
            (THREADS, 1, 1),
            *(inputs.qkv.address, inputs.z.address, inputs.gates.address),
            *constants,
            *(rules, rings, slots, captures, positions, output),
            *(inputs.qkv.stride, inputs.z.stride, inputs.gates.stride),
            *(rule_stride, ring_stride),
            *(sizes.num_k_heads, sizes.num_v_heads, self._norm_eps),
            dependent=dependent,
        )
