"""What sequences and steps occupy on the GPU: recurrent states, KV pages, and a step's arrays.

Owns their sizes and addresses, and moves states and pages between the device and the host. Knows
no weights and launches no kernel. Engine thread only.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, HostBytes
from daemon.engine.memory.memory_plan import PAGES, STATES
from daemon.engine.model.shape import ModelShape
from daemon.errors import UnsupportedModel
from daemon.kernels.delta_prefill import workspace_bytes
from daemon.kernels.delta_state import DeltaSizes, DeltaSlots
from daemon.kernels.kv_format import HEAD_DIM, KvFormat, KvLayout
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.pinned_pool import PinnedPool
from daemon.kernels.runtime.upload import Uploader

F32 = ElementType.F32
ROTATED_DIMS = 64
READY_STATES, READY_PAGES = 4, 256
"""Pinned host buffers at hand for snapshots: four states, and pages of 16,384 tokens."""

RESTORE_PIECE_BYTES = 4 * 2**20
"""Small, since these buffers stay pinned."""


BUCKETS = (1, 2, 4, 8, 16)
"""Sizes of decode batches; a batch is padded to the next."""


class CudaLimits(Struct, frozen=True, kw_only=True):
    """`max_rows` of one prefill batch; formats of stored keys and values; host memory to pin."""

    max_rows: int = 2048
    max_sequences: int = BUCKETS[-1]
    context_length: int
    k_format: KvFormat = KvFormat.BF16
    v_format: KvFormat = KvFormat.BF16
    pinned_bytes: int = 2**31

    @property
    def decode_rows(self) -> int:
        """Rows of the largest decode batch."""
        return next(size for size in BUCKETS if size >= self.max_sequences)

    @property
    def max_pages(self) -> int:
        """Columns of a page table: pages of the longest sequence, and one to grow into."""
        return -(-self.context_length // PAGE_TOKENS) + 1


class SnapshotReading:
    """Buffers that the stream fills, complete once it has passed an event; `events` are spare."""

    def __init__(self, device: Device, events: deque[Any], buffers: list[HostBytes]) -> None:
        self._device = device
        self._events = events
        self._arrived = events.popleft() if events else device.new_event()
        self._buffers = buffers
        device.mark(self._arrived)

    def is_done(self) -> bool:
        """Whether the stream has come so far."""
        return self._device.has_passed(self._arrived)

    def result(self) -> tuple[HostBytes, list[HostBytes]]:
        """The state, and the pages; waits."""
        self._device.wait_for(self._arrived)
        self._events.append(self._arrived)
        state, *contents = self._buffers
        return state, contents


class SequenceMemory:
    """Recurrent states in slots, keys and values in pages; both move as bytes.

    Raises:
        UnsupportedModel: sizes of heads that the kernels do not have.
        OutOfDeviceMemory: it does not fit.
    """

    def __init__(
        self,
        device: Device,
        shape: ModelShape,
        limits: CudaLimits,
        num_slots: int,
        num_pages: int,
        buffers: PinnedPool,
    ) -> None:
        check_heads(shape)
        self._device = device
        self.layout = kv_layout(shape, limits)
        with device.region(PAGES):
            self.pool = device.allocate((num_pages, self.layout.page_bytes), ElementType.U8)
        sizes, layers = delta_sizes(shape), shape.num_delta_layers
        slot_bytes = DeltaSlots.slot_bytes(sizes, layers)
        with device.region(STATES):
            memory = device.allocate((num_slots, slot_bytes), ElementType.U8)
        self.slots = DeltaSlots(memory, sizes, layers, num_slots)
        self._events: deque[Any] = deque()
        self._buffers = buffers
        self._buffers.prepare(slot_bytes, READY_STATES)
        self._buffers.prepare(self.layout.page_bytes, READY_PAGES)
        self._uploader = Uploader(device, buffer_bytes=RESTORE_PIECE_BYTES)

    def clear_slot(self, slot: int) -> None:
        """The state before the first token is zero."""
        self.slots.clear(self._device, slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Within the device, in the stream's order."""
        self.slots.copy(self._device, source, target)

    def begin_read(self, slot: int, pages: Sequence[int]) -> SnapshotReading:
        """Into buffers of the pinned pool, as part of the stream; nothing waits."""
        places = [self.slots.slot(slot), *(self.pool.rows(page, page + 1) for page in pages)]
        buffers: list[HostBytes] = [self._buffers.take(place.num_bytes) for place in places]
        for place, buffer in zip(places, buffers, strict=True):
            self._device.read(place, np.frombuffer(buffer, np.uint8))
        return SnapshotReading(self._device, self._events, buffers)

    def write_snapshot(self, slot: int, state: HostBytes, pages: Mapping[int, HostBytes]) -> None:
        """Pinned buffers go as they are, other memory through the uploader's."""
        self._uploader.follow()
        self._write(self.slots.slot(slot), state)
        for page, content in pages.items():
            self._write(self.pool.rows(page, page + 1), content)
        self._uploader.wait()

    def _write(self, place: DeviceArray, content: HostBytes) -> None:
        values = np.frombuffer(content, np.uint8)
        if self._buffers.owns(values):
            self._device.write(place, values)
        else:
            self._uploader.copy(values, place)


class Workspace:
    """Arrays that every step overwrites; recorded graphs keep their addresses.

    `residual` float32 `[rows, hidden]`; `narrow` and `wide` fp16 operands of hidden size and of
    any; `projected` into a mixer, float32 in decode and fp16 in prefill; `queries` 16 bits;
    `picked` the rows whose logits are wanted; `chunks` the delta net's between its prefill kernels.

    Args:
        stacked_columns: see `WeightLoader`.
    """

    def __init__(
        self, device: Device, shape: ModelShape, limits: CudaLimits, stacked_columns: int
    ) -> None:
        allocate, rows, widths = device.allocate, limits.max_rows, _widths(shape)
        self.residual = allocate((rows, shape.hidden), F32)
        self.narrow = allocate((rows * shape.hidden,), ElementType.F16)
        self.wide = allocate((rows * widths.operand,), ElementType.F16)
        projected = max(rows * widths.projected, 2 * limits.decode_rows * widths.projected)
        self.projected = allocate((max(projected, 2 * rows * stacked_columns),), ElementType.F16)
        layout = kv_layout(shape, limits)
        queries = ElementType.BF16 if layout.queries_are_bf16 else ElementType.F16
        self.queries = allocate((rows * shape.attention.num_heads * HEAD_DIM,), queries)
        self.picked = allocate((limits.decode_rows, shape.hidden), F32)
        self.logits = allocate((limits.decode_rows, shape.vocab_size), F32)
        chunks = workspace_bytes(delta_sizes(shape), _max_chunks(limits))
        self.chunks = allocate((chunks,), ElementType.U8)


class _Widths(NamedTuple):
    """Columns of the widest projection and fp16 operand of a model."""

    projected: int
    operand: int


def _widths(shape: ModelShape) -> _Widths:
    attention, delta = shape.attention, shape.delta_net
    attended = attention.num_heads * attention.head_dim
    kv = attention.num_kv_heads * attention.head_dim
    delta_row = delta.conv_dim + delta.value_size + 2 * delta.num_v_heads
    operand = max(attended, delta.value_size, shape.dense_dim)
    return _Widths(max(2 * attended + 2 * kv, delta_row), operand)


def _max_chunks(limits: CudaLimits) -> int:
    """Each span of a batch ends in a chunk that need not be whole."""
    return limits.max_rows // PAGE_TOKENS + limits.max_sequences


def kv_layout(shape: ModelShape, limits: CudaLimits) -> KvLayout:
    """How the pages of a model lie in memory."""
    heads = shape.attention.num_kv_heads
    return KvLayout(shape.num_attention_layers, heads, limits.k_format, limits.v_format)


def delta_sizes(shape: ModelShape) -> DeltaSizes:
    """Heads of a delta-net layer, checked against what the kernels have."""
    sizes = shape.delta_net
    return DeltaSizes.checked(
        sizes.num_k_heads, sizes.num_v_heads, sizes.k_dim, sizes.v_dim, sizes.conv_width
    )


def check_heads(shape: ModelShape) -> None:
    """Raises UnsupportedModel for attention heads that the kernels do not have."""
    found = shape.attention.head_dim, shape.attention.rope_dim
    if found != (HEAD_DIM, ROTATED_DIMS):
        raise UnsupportedModel(
            f"the GPU kernels need attention heads of {HEAD_DIM} with {ROTATED_DIMS} rotated "
            f"dims; this model has {found[0]} and {found[1]}"
        )
