"""Times the kernels between the products on the GPU, with 27B shapes, beside their limits.

The gated delta net and attention, in decode and in prefill. Products have scripts of their own:
`quant_linear` and `moe`. Limits: bytes that must move over the rate of a plain read,
or operations over the tensor cores' rate, whichever takes longer.

    python -m benchmarks.kernels [results.json]
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.quant_linear import Products
from daemon.kernels.attention_decode import AttentionDecode
from daemon.kernels.attention_prefill import AttentionPrefill
from daemon.kernels.attention_tiles import PARTIAL_BYTES
from daemon.kernels.delta_prefill import (
    DeltaPrefill,
    PrefillSpan,
    PrefillTables,
    chunk_tables,
    workspace_bytes,
)
from daemon.kernels.delta_state import (
    DeltaConstants,
    DeltaInputs,
    DeltaSizes,
    DeltaSlots,
    DeltaTypes,
)
from daemon.kernels.delta_step import DeltaStep
from daemon.kernels.kv_format import HEAD_DIM, PAGE_TOKENS, KvFormat, KvLayout
from daemon.kernels.quant_activations import padded_tokens
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

F32, F16 = ElementType.F32, ElementType.F16
SIZES = DeltaSizes(16, 48)
NUM_LAYERS = 48
"""Of the 27B: their states together are more than fits a cache."""

Q_HEADS, KV_HEADS = 24, 4
EPS = 1e-6
TFLOPS = 700.0
"""What cuBLAS reaches in fp16 on an H100."""


class Row(NamedTuple):
    """One kernel, or the kernels of one operation: median and limit in microseconds."""

    what: str
    median_us: float
    limit_us: float


class Bench:
    """The card, its rate, and the rows so far."""

    def __init__(self) -> None:
        self.products = Products()
        self.device, self.compiler = self.products.device, self.products.compiler
        self.rng = self.products.rng
        self.read_gbps = self.products.read_rate()
        self.rows: list[Row] = []

    def normal(self, first: int, *rest: int, dtype: ElementType = F32) -> DeviceArray:
        """Random values; beyond 1,024 rows they repeat."""
        few = self.rng.normal(size=(min(first, 1024), *rest)).astype(dtype.carrier)
        repeats = -(-first // len(few))
        return self.device.to_device(np.concatenate([few] * repeats)[:first])

    def time(
        self, what: str, launches: Sequence[Callable[[], None]], num_bytes: float, flops: float = 0
    ) -> None:
        """Median of one of `launches`, which run one after the other; print it."""

        def all_of_them() -> None:
            for launch in launches:
                launch()

        us = self.products.median_ms(all_of_them) * 1e3 / len(launches)
        limit = max(num_bytes / self.read_gbps / 1e3, flops / TFLOPS / 1e6)
        self.rows.append(Row(what, round(us, 2), round(limit, 2)))
        print(f"{what:48} {us:9.1f} us   limit {limit:9.1f} us   {limit / us:5.0%}", flush=True)


# ── the gated delta net ───────────────────────────────────────────────────────────────────────


class DeltaLayer:
    """Weights and states of NUM_LAYERS layers; all have the same weights."""

    def __init__(self, bench: Bench, num_slots: int, projections: ElementType) -> None:
        self.bench, device = bench, bench.device
        self.constants = DeltaConstants(
            bench.normal(SIZES.conv_dim, 4),
            device.to_device(-np.exp(bench.rng.normal(size=SIZES.num_v_heads)).astype(np.float32)),
            bench.normal(SIZES.num_v_heads),
            bench.normal(128),
        )
        self.types = DeltaTypes(projections, F16)
        size = DeltaSlots.slot_bytes(SIZES, NUM_LAYERS)
        memory = device.allocate((num_slots * size,), ElementType.U8)
        device.fill(memory, 0)
        self.states = DeltaSlots(memory, SIZES, NUM_LAYERS, num_slots)

    def inputs(self, num_rows: int) -> DeltaInputs:
        """Random projections."""
        columns = SIZES.conv_dim + SIZES.value_size + 2 * SIZES.num_v_heads
        self.rows = self.bench.normal(num_rows, columns, dtype=self.types.projections)
        return DeltaInputs.of_rows(self.rows, SIZES)


def delta_decode(bench: Bench, num_sequences: int) -> None:
    """All layers of a token, each started before the one before has ended."""
    layer = DeltaLayer(bench, num_sequences, F32)
    step = DeltaStep(bench.device, bench.compiler, SIZES, layer.types, EPS)
    inputs = layer.inputs(num_sequences)
    upload = bench.device.to_device
    slots, captures, positions = (
        upload(np.array(values, np.int32))
        for values in (range(num_sequences), [-1] * num_sequences, [100] * num_sequences)
    )
    out = bench.device.allocate((padded_tokens(num_sequences), SIZES.value_size), F16)

    def run(index: int) -> Callable[[], None]:
        return lambda: step(
            inputs, layer.constants, layer.states, index, slots, captures, positions, out, True
        )

    state = 2 * 4 * SIZES.rule_floats * num_sequences
    name = f"delta net, decode, {num_sequences} sequences, a layer"
    bench.time(name, [run(index) for index in range(NUM_LAYERS)], state)


def delta_prefill(bench: Bench, num_tokens: int) -> None:
    """Prepare, scan and gate of one layer."""
    layer = DeltaLayer(bench, 1, F16)
    chunks, spans = chunk_tables([PrefillSpan(0, num_tokens, 0)])
    tables = PrefillTables(*(bench.device.to_device(x) for x in (chunks, spans)))
    space = bench.device.allocate((workspace_bytes(SIZES, len(chunks)),), ElementType.U8)
    prefill = DeltaPrefill(bench.device, bench.compiler, SIZES, layer.types, EPS, space)
    inputs = layer.inputs(num_tokens)
    out = bench.device.allocate((padded_tokens(num_tokens), SIZES.value_size), F16)

    def run(index: int) -> Callable[[], None]:
        return lambda: prefill(inputs, layer.constants, layer.states, index, tables, out)

    columns = SIZES.conv_dim + SIZES.value_size
    num_bytes = num_tokens * 2 * (columns + SIZES.value_size)
    flops = num_tokens * SIZES.num_v_heads * 170e3
    name = f"delta net, prefill, {num_tokens} tokens, a layer"
    bench.time(name, [run(index) for index in range(4)], num_bytes, flops)


# ── attention ─────────────────────────────────────────────────────────────────────────────────


class Cache:
    """Random queries and projections, and pages of q8_0 with whatever lies in memory as zeros."""

    def __init__(
        self, bench: Bench, num_sequences: int, length: int, num_rows: int, projections: ElementType
    ) -> None:
        device = bench.device
        self.layout = KvLayout(2, KV_HEADS, KvFormat.Q8_0, KvFormat.Q8_0)
        pages = -(-length // PAGE_TOKENS)
        table = np.arange(num_sequences * pages, dtype=np.int32).reshape(num_sequences, pages)
        self.page_table = device.to_device(table)
        self.pool = device.allocate((table.size, self.layout.page_bytes), ElementType.U8)
        device.fill(self.pool, 0)
        columns = (2 * Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.projections = bench.normal(num_rows, columns, dtype=projections)
        halves = bench.rng.normal(size=(num_rows, Q_HEADS, HEAD_DIM)).astype(np.float16)
        self.queries = device.to_device(halves, F16)
        self.out = device.allocate((padded_tokens(num_rows), Q_HEADS * HEAD_DIM), F16)


def attention_decode(bench: Bench, num_sequences: int, length: int) -> None:
    """One token of each sequence, over two layers in turn."""
    cache = Cache(bench, num_sequences, length, num_sequences, F32)
    kernel = AttentionDecode(
        bench.device, bench.compiler, cache.layout, Q_HEADS, num_sequences, F32, F16
    )
    positions = bench.device.to_device(np.full(num_sequences, length - 1, np.int32))

    def run(layer: int) -> Callable[[], None]:
        place = (cache.page_table, cache.pool, layer, cache.out)
        return lambda: kernel(cache.queries, cache.projections, positions, *place, dependent=True)

    num_bytes = num_sequences * length * cache.layout.layer_bytes / PAGE_TOKENS
    name = f"attention, decode, {num_sequences} x {length} tokens of q8_0, a layer"
    bench.time(name, [run(0), run(1)] * 4, num_bytes)


def attention_prefill(bench: Bench, num_tokens: int, before: int) -> None:
    """A chunk of one sequence after `before` tokens."""
    cache = Cache(bench, 1, before + num_tokens, num_tokens, F16)
    scratch = bench.device.allocate((96 * Q_HEADS * PARTIAL_BYTES,), ElementType.U8)
    kernel = AttentionPrefill(
        bench.device, bench.compiler, cache.layout, Q_HEADS, F16, F16, scratch
    )
    dealt = kernel.dealer.deal([(0, before, num_tokens, 0)])
    items, merges = (bench.device.to_device(lines) for lines in dealt)

    def run(layer: int) -> Callable[[], None]:
        place = (cache.page_table, cache.pool, layer, cache.out)
        return lambda: kernel(cache.queries, cache.projections, items, merges, *place)

    pairs = num_tokens * before + num_tokens * (num_tokens + 1) / 2
    name = f"attention, prefill, {num_tokens} after {before} tokens, a layer"
    bench.time(name, [run(0), run(1)], 0, 4 * pairs * Q_HEADS * HEAD_DIM)


def main() -> None:
    """Print every row; write them where the first argument says."""
    bench = Bench()
    print(f"{bench.device.name}: reads {bench.read_gbps:.0f} GB/s")
    for num_sequences in (1, 8):
        delta_decode(bench, num_sequences)
    for num_tokens in (512, 2048, 32_768):
        delta_prefill(bench, num_tokens)
    for num_sequences, length in ((1, 24_576), (8, 24_576), (1, 131_072)):
        attention_decode(bench, num_sequences, length)
    for num_tokens, before in (
        (2048, 0), (64, 24_576), (512, 24_576), (2048, 24_576), (64, 131_072)
    ):  # fmt: skip
        attention_prefill(bench, num_tokens, before)
    rows = [row._asdict() for row in bench.rows]
    record = {"card": bench.device.name, "read_gbps": bench.read_gbps, "rows": rows}
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
