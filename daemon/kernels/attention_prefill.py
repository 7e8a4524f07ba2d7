"""Launches `attention_prefill.cu`, or `attention_prefill_wgmma.cu` on Hopper: prompts attend."""

from pathlib import Path

from daemon.kernels import attention_prefill_wgmma
from daemon.kernels.attention_tiles import (
    PARTIAL_BYTES,
    TILE_BYTES,
    PrefillVariant,
    TileDealer,
    variant_defines,
)
from daemon.kernels.kv_format import KvLayout
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 7 + ("int32",) * 4 + ("int64",) * 2
MERGE_PARAMETERS = ("pointer",) * 4 + ("int32",) * 2
THREADS_PER_HEAD = 128


def variant(
    layout: KvLayout,
    group: int,
    projection: ElementType,
    output: ElementType,
    shared_bytes_per_block: int,
) -> PrefillVariant:
    """The kernel for every card; two query heads share a page where shared memory holds them."""
    heads = 2 if group % 2 == 0 and shared_bytes_per_block >= 4 * TILE_BYTES else 1
    defines = {**variant_defines(layout, group, projection, output), "HEADS": heads}
    threads = heads * THREADS_PER_HEAD
    return PrefillVariant(SOURCE, defines, heads, threads, (heads + 2) * TILE_BYTES)


class AttentionPrefill:
    """The kernel for one layout of pages.

    Args:
        scratch: for what came of segments of keys, as `dealer` deals them: of any type and size.
        chosen: a variant to use instead of the card's best.
    """

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        layout: KvLayout,
        q_heads: int,
        projection: ElementType,
        output: ElementType,
        scratch: DeviceArray,
        chosen: PrefillVariant | None = None,
    ) -> None:
        group, rest = divmod(q_heads, layout.kv_heads)
        assert rest == 0
        if chosen is None and attention_prefill_wgmma.fits(compiler.arch, group):
            chosen = attention_prefill_wgmma.variant(layout, group, projection, output)
        elif chosen is None:
            shared = device.shared_bytes_per_block
            chosen = variant(layout, group, projection, output, shared)
        module = Module(compiler.cubin(chosen.source, chosen.defines))
        self._kernel = module.kernel(chosen.source.stem, PARAMETERS, chosen.shared_bytes)
        self._merge = module.kernel("attention_prefill_merge", MERGE_PARAMETERS)
        self._scratch = scratch
        self._variant = chosen
        self._stream = device.stream
        self._layout = layout
        self._q_heads = q_heads
        self._blocks = q_heads // chosen.heads
        num_slots = scratch.num_bytes // (q_heads * PARTIAL_BYTES)
        self.dealer = TileDealer(self._blocks, device.num_sms, num_slots)

    def __call__(
        self,
        queries: DeviceArray,
        projections: DeviceArray,
        items: DeviceArray,
        merges: DeviceArray,
        page_table: DeviceArray,
        pool: DeviceArray,
        layer: int,
        output: DeviceArray,
        dependent: bool = False,
    ) -> None:
        """Gated causal attention of every row of `items`, after their keys were appended.

        Args:
            queries: 16-bit `[rows, q_heads, 256]` from `KvAppend`.
            projections: the rows that `KvAppend` read; gates are taken from them.
            items, merges: `QueryItems` of `dealer`.
            output: `[rows, q_heads, 256]`, or an operand `[padded rows, q_heads * 256]`; rows of
                no item are left as they are.
        """
        self._kernel.launch(
            self._stream,
            (items.shape[0], self._blocks, 1),
            (self._variant.threads, 1, 1),
            queries,
            projections,
            items,
            page_table,
            pool,
            self._scratch,
            output,
            projections.shape[1],
            page_table.shape[1],
            self._layout.kv_heads,
            output.shape[0],
            self._layout.page_bytes,
            self._layout.layer_offset(layer),
            shared_bytes=self._variant.shared_bytes,
            dependent=dependent,
        )
        if merges.shape[0] > 0:
            self._merge.launch(
                self._stream,
                (merges.shape[0], self._q_heads, 1),
                (THREADS_PER_HEAD, 1, 1),
                *(projections, merges, self._scratch, output),
                *(projections.shape[1], output.shape[0]),
            )
