"""What sequences and steps occupy on the GPU: recurrent states, KV pages, and a step's arrays.

Owns their sizes and addresses. Knows no weights and launches no kernel. Engine thread only.
"""

from typing import NamedTuple

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.cuda_transfers import SnapshotTransfers
from daemon.engine.memory.memory_plan import PAGES, STATES
from daemon.engine.model.shape import ModelShape
from daemon.errors import UnsupportedModel
from daemon.kernels.attention_tiles import PARTIAL_BYTES
from daemon.kernels.delta_prefill import workspace_bytes
from daemon.kernels.delta_state import DeltaSizes, DeltaSlots
from daemon.kernels.kv_format import HEAD_DIM, KvFormat, KvLayout
from daemon.kernels.runtime.copy_lane import CopyLane
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import ElementType
from daemon.kernels.runtime.pinned_pool import PinnedPool

F32 = ElementType.F32
ROTATED_DIMS = 64
READY_STATES = 4
"""Pinned host buffers at hand for states; there are as many for pages as the context has, but for
no more than half of what may be pinned."""

SEGMENT_SLOTS = 64
"""Segments of a prompt's keys whose sums attention may keep: ten tiles after 48K tokens."""

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


class SequenceMemory:
    """Recurrent states in slots, keys and values in pages; `transfers` moves both as bytes.

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
        lanes: tuple[CopyLane, CopyLane],
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
        most_pages = buffers.limit_bytes // 2 // self.layout.page_bytes
        buffers.prepare(slot_bytes, READY_STATES)
        buffers.prepare(self.layout.page_bytes, min(limits.max_pages, most_pages))
        self.transfers = SnapshotTransfers(
            device, self.slots, self.pool, self.layout, shape.layers, buffers, lanes
        )

    def clear_slot(self, slot: int) -> None:
        """The state before the first token is zero."""
        self.transfers.before_writing([slot])
        self.slots.clear(self._device, slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Within the device, in the stream's order."""
        self.transfers.before_reading(source)
        self.transfers.before_writing([target])
        self.slots.copy(self._device, source, target)


class Workspace:
    """Arrays that every step overwrites; recorded graphs keep their addresses.

    `residual` float32 `[rows, hidden]`; `narrow` and `wide` fp16 operands of hidden size and of
    any; `projected` into a mixer, float32 in decode and fp16 in prefill; `queries` 16 bits;
    `picked` the rows whose logits are wanted; `scratch` what a mixer's prefill kernels hand on.

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
        # Two places of fp16 for what is float32.
        projected = max(rows, 2 * limits.decode_rows) * widths.projected
        self.projected = allocate((max(projected, 2 * rows * stacked_columns),), ElementType.F16)
        layout = kv_layout(shape, limits)
        queries = ElementType.BF16 if layout.queries_are_bf16 else ElementType.F16
        self.queries = allocate((rows * shape.attention.num_heads * HEAD_DIM,), queries)
        self.picked = allocate((limits.decode_rows, shape.hidden), F32)
        self.logits = allocate((limits.decode_rows, shape.vocab_size), F32)
        self.scratch = allocate((_scratch_bytes(shape, limits),), ElementType.U8)


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


def _scratch_bytes(shape: ModelShape, limits: CudaLimits) -> int:
    """Enough for the delta net's chunks, and for attention to work on segments side by side."""
    chunks = _max_chunks(limits)
    slots = max(chunks, SEGMENT_SLOTS) * shape.attention.num_heads
    return max(workspace_bytes(delta_sizes(shape), chunks), slots * PARTIAL_BYTES)


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
