"""Launches `attention_decode.cu`: one new token of each sequence attends to its pages."""

from pathlib import Path
from typing import NamedTuple

from daemon.kernels.attention_tiles import OUTPUTS
from daemon.kernels.kv_format import HEAD_DIM, KvLayout
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 5 + ("int32",) * 2 + ("int64",) * 2
MERGE_PARAMETERS = ("pointer",) * 4 + ("int32",) * 2
MERGE_THREADS = HEAD_DIM // 4
STRIP_TOKENS = 16
MAX_GROUP = 16
WARPS = 4
MAX_STAGES = 4
STATIC_BYTES = 2048


class DecodeShape(NamedTuple):
    """Constants of the kernel that follow from the card: warps, ring depth, splits, bytes."""

    warps: int
    stages: int
    max_splits: int
    shared_bytes: int


def choose_shape(
    layout: KvLayout, group: int, num_sms: int, shared_bytes_per_block: int
) -> DecodeShape:
    """Two blocks a multiprocessor when there are several sequences; splits that fill the card once.

    The number of splits is a constant of card and model, so that bits do not depend on the batch.
    """
    slot = max(layout.k_format.block_bytes, layout.v_format.block_bytes) // 64 * STRIP_TOKENS
    half = shared_bytes_per_block // 2 - STATIC_BYTES
    stages = max(2, min(MAX_STAGES, half // (WARPS * slot)))
    merge = WARPS * group * (HEAD_DIM + 4) * 4
    return DecodeShape(
        WARPS, stages, max(1, num_sms // layout.kv_heads), max(WARPS * stages * slot, merge)
    )


def defines(
    layout: KvLayout, group: int, shape: DecodeShape, projection: ElementType, output: ElementType
) -> dict[str, str | int]:
    """Macros of one variant."""
    return {
        **layout.defines,
        "GROUP": group,
        "WARPS": shape.warps,
        "STAGES": shape.stages,
        "PROJECTION_F16": int(projection is ElementType.F16),
        "OUTPUT": OUTPUTS[output],
    }


class AttentionDecode:
    """The kernel for one layout of pages, with its scratch memory for `max_sequences`."""

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        layout: KvLayout,
        q_heads: int,
        max_sequences: int,
        projection: ElementType,
        output: ElementType,
        shape: DecodeShape | None = None,
    ) -> None:
        group, rest = divmod(q_heads, layout.kv_heads)
        assert rest == 0
        assert 1 <= group <= MAX_GROUP
        self._shape = shape or choose_shape(
            layout, group, device.num_sms, device.shared_bytes_per_block
        )
        cubin = compiler.cubin(SOURCE, defines(layout, group, self._shape, projection, output))
        self._num_sms = device.num_sms
        self._alone_bytes = device.shared_bytes_per_block // 2 + STATIC_BYTES
        shared = max(self._shape.shared_bytes, self._alone_bytes)
        module = Module(cubin)
        self._kernel = module.kernel("attention_decode", PARAMETERS, shared)
        self._merge = module.kernel("attention_decode_merge", MERGE_PARAMETERS)
        results = (max_sequences, layout.kv_heads, self._shape.max_splits, group * (HEAD_DIM + 2))
        self._partials = device.allocate(results, ElementType.F32)
        self._stream = device.stream
        self._layout = layout
        self._q_heads = q_heads

    def __call__(
        self,
        queries: DeviceArray,
        projections: DeviceArray,
        positions: DeviceArray,
        page_table: DeviceArray,
        pool: DeviceArray,
        layer: int,
        output: DeviceArray,
        dependent: bool = False,
    ) -> None:
        """Gated attention of row i over the pages of line i of `page_table`.

        Args:
            queries: 16-bit `[sequences, q_heads, 256]` from `KvAppend`.
            projections: the rows that `KvAppend` read; gates are taken from them.
            positions: i32 `[sequences]` of the new tokens; negative rows become zero.
            output: `[sequences, q_heads, 256]`, or an operand's panels, written.
        """
        num_sequences = positions.shape[0]
        shared_bytes = self._shape.shared_bytes
        # Few blocks: one a multiprocessor. Two of them side by side would leave another one idle.
        if self._shape.max_splits * self._layout.kv_heads * num_sequences <= self._num_sms:
            shared_bytes = max(shared_bytes, self._alone_bytes)
        assert num_sequences <= self._partials.shape[0]
        self._kernel.launch(
            self._stream,
            (self._shape.max_splits, self._layout.kv_heads, num_sequences),
            (self._shape.warps * 32, 1, 1),
            queries,
            positions,
            page_table,
            pool,
            self._partials,
            page_table.shape[1],
            self._shape.max_splits,
            self._layout.page_bytes,
            self._layout.layer_offset(layer),
            shared_bytes=shared_bytes,
            dependent=dependent,
        )
        self._merge.launch(
            self._stream,
            (self._q_heads, num_sequences, 1),
            (MERGE_THREADS, 1, 1),
            self._partials,
            projections,
            positions,
            output,
            projections.shape[1],
            self._shape.max_splits,
            dependent=True,
        )
