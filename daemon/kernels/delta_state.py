"""Where the recurrent states of all slots lie, and how one moves between device and host.

A slot is one stretch of memory, so a snapshot is one copy: first the rule states of all delta-net
layers, float32 `[layers, v_heads, 128 k, 128 v]`, then their convolution rows, float32 too,
`[layers, CONV_RING, conv_dim]`; the row of position p lies at p mod CONV_RING. Engine thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from daemon.errors import UnsupportedModel
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

HEAD_DIM = 128
CONV_WIDTH = 4
CONV_RING = 4
"""Rows kept before the convolution. A later ring of 16 can hold drafted tokens, undone by position
alone; the kernels' include/delta_math.cuh has the same number."""


class DeltaSizes(NamedTuple):
    """Heads of one layer; value head h uses key head h mod `num_k_heads`."""

    num_k_heads: int
    num_v_heads: int

    @classmethod
    def checked(
        cls, num_k_heads: int, num_v_heads: int, k_dim: int, v_dim: int, conv_width: int
    ) -> DeltaSizes:
        """Sizes of a model that the kernels can run.

        Raises:
            UnsupportedModel: another head size or convolution width, or heads that do not divide.
        """
        if (k_dim, v_dim, conv_width) != (HEAD_DIM, HEAD_DIM, CONV_WIDTH):
            raise UnsupportedModel(
                f"The GPU kernels need delta-net heads of {HEAD_DIM} and a convolution of width "
                f"{CONV_WIDTH}; this model has {k_dim}, {v_dim} and {conv_width}."
            )
        if num_k_heads < 1 or num_v_heads < 1 or num_v_heads % num_k_heads:
            raise UnsupportedModel(
                f"{num_v_heads} value heads do not share {num_k_heads} key heads evenly."
            )
        return cls(num_k_heads, num_v_heads)

    @property
    def value_size(self) -> int:
        """Elements of all value heads."""
        return self.num_v_heads * HEAD_DIM

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys, values."""
        return 2 * self.num_k_heads * HEAD_DIM + self.value_size

    @property
    def rule_floats(self) -> int:
        """Elements of one layer's rule state."""
        return self.value_size * HEAD_DIM


OUTPUTS = {ElementType.F32: 0, ElementType.F16: 1}
"""Values of the macro OUTPUT."""


class DeltaTypes(NamedTuple):
    """Element types, each F32 or F16: of projected rows, and of outputs.

    Outputs of F16 are an operand of quantized products, in the layout that the kernel's kind takes.
    """

    projections: ElementType
    outputs: ElementType

    @property
    def defines(self) -> dict[str, str | int]:
        """Macros of the kernels."""
        assert self.projections in (ElementType.F32, ElementType.F16)
        return {
            "PROJECTION_F16": int(self.projections is ElementType.F16),
            "OUTPUT": OUTPUTS[self.outputs],
        }


class DeltaConstants(NamedTuple):
    """One layer's small weights, float32, on the device.

    `taps` `[conv_dim, 4]`, oldest first; `rates` `[v_heads]`, which are -exp(A_log); `dt_bias`
    `[v_heads]`; `norm` `[128]`.
    """

    taps: DeviceArray
    rates: DeviceArray
    dt_bias: DeviceArray
    norm: DeviceArray


class Columns(NamedTuple):
    """Part of each row of a row-major array: address of row 0's part, and elements per row."""

    address: int
    stride: int


class DeltaInputs(NamedTuple):
    """Projections of a batch's rows: `qkv` (q, k, v heads), `z`, and `gates` (beta, then alpha)."""

    qkv: Columns
    z: Columns
    gates: Columns

    @classmethod
    def of_rows(cls, rows: DeviceArray, sizes: DeltaSizes) -> DeltaInputs:
        """Parts of rows `[rows, qkv | z | beta | alpha]`; padding may follow in a row."""
        width, item = rows.shape[1], rows.dtype.num_bytes
        z = sizes.conv_dim
        gates = z + sizes.value_size
        assert gates + 2 * sizes.num_v_heads <= width
        # Four elements of qkv and z travel in one load.
        assert width % 4 == 0
        starts = (rows.pointer + column * item for column in (0, z, gates))
        return cls(*(Columns(start, width) for start in starts))


class DeltaSlots:
    """The memory of all slots."""

    def __init__(
        self,
        memory: DeviceArray,
        sizes: DeltaSizes,
        num_layers: int,
        num_slots: int,
    ) -> None:
        slot_bytes = DeltaSlots.slot_bytes(sizes, num_layers)
        assert memory.num_bytes == num_slots * slot_bytes
        assert memory.pointer % 16 == 0
        self.sizes = sizes
        self.memory = memory.view((num_slots, slot_bytes), ElementType.U8)
        self._num_layers = num_layers

    @staticmethod
    def slot_bytes(sizes: DeltaSizes, num_layers: int) -> int:
        """Bytes of one slot, a multiple of 16."""
        return num_layers * (sizes.rule_floats + CONV_RING * sizes.conv_dim) * 4

    def rules(self, layer: int) -> tuple[DeviceArray, int]:
        """One layer's rule states: the array that starts at slot 0's, and floats per slot."""
        return self._at(layer * self.sizes.rule_floats)

    def rings(self, layer: int) -> tuple[DeviceArray, int]:
        """One layer's convolution rows: the array that starts at slot 0's, and floats per slot."""
        ring = CONV_RING * self.sizes.conv_dim
        return self._at(self._num_layers * self.sizes.rule_floats + layer * ring)

    def layer_bytes(self, layers: range) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where in a slot adjacent layers' rule states and convolution rows lie: `[from, to)`."""
        rule = self.sizes.rule_floats * 4
        ring = CONV_RING * self.sizes.conv_dim * 4
        rings = self._num_layers * rule
        return (
            (layers.start * rule, layers.stop * rule),
            (rings + layers.start * ring, rings + layers.stop * ring),
        )

    def slot(self, slot: int) -> DeviceArray:
        """The bytes of one slot."""
        return self.memory.rows(slot, slot + 1)

    def clear(self, device: Device, slot: int) -> None:
        """The state before the first token."""
        device.fill(self.slot(slot), 0)

    def copy(self, device: Device, source: int, target: int) -> None:
        """Copy a slot's state within the device."""
        device.copy(self.slot(target), self.slot(source))

    def read(self, device: Device, slot: int, host: np.ndarray[Any, Any]) -> None:
        """Copy a slot out; pinned bytes go at full speed, complete after `synchronize`."""
        device.read(self.slot(slot), host)

    def write(self, device: Device, slot: int, host: np.ndarray[Any, Any]) -> None:
        """The inverse of `read`; keep pinned bytes until the stream has passed."""
        device.write(self.slot(slot), host)

    def _at(self, floats: int) -> tuple[DeviceArray, int]:
        num_slots, slot_bytes = self.memory.shape
        size = num_slots * slot_bytes // 4 - floats
        return self.memory.view((size,), ElementType.F32, floats * 4), slot_bytes // 4
