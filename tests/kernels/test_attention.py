"""Append, decode and prefill attention over paged keys and values against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_reference import chunk_values, panel_values

pytest.importorskip("cuda.core")

from daemon.kernels import (
    attention_decode,
    attention_prefill,
    attention_prefill_wgmma,
    attention_tiles,
    kv_append,
)
from daemon.kernels.attention_decode import AttentionDecode
from daemon.kernels.attention_prefill import AttentionPrefill
from daemon.kernels.attention_tiles import PARTIAL_BYTES, TileDealer, query_tiles
from daemon.kernels.kv_append import KvAppend
from daemon.kernels.kv_format import HEAD_DIM, PAGE_TOKENS, KvFormat, KvLayout
from daemon.kernels.quant_activations import padded_tokens
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

if TYPE_CHECKING:
    from daemon.kernels.runtime.device import Device

F32, BF16, F16 = ElementType.F32, ElementType.BF16, ElementType.F16
BYTES_OF_ARCH = {"sm_80": 166912, "sm_90a": 232448}
SMALL_SHARED = 101376
FORMATS = list(KvFormat)
MIXED = [*((f, f) for f in FORMATS), (KvFormat.Q8_0, KvFormat.Q4_0), (KvFormat.BF16, KvFormat.FP8)]
COMPILED = [MIXED[1], *MIXED[-2:]]  # every format once at least
FORMAT_IDS = [f"{k.name}-{v.name}" for k, v in MIXED]
# By query heads of a block: with one (cards with 99 KB) a thread holds twice as much of a page.
SPILL_BUDGET = {1: 320, 2: 96}
WGMMA_SPILL_BUDGET = 256  # of the producer, which has 48 registers


def from_bf16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp8_table() -> np.ndarray[Any, Any]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size)


def unpack_block(block: np.ndarray[Any, Any], form: KvFormat) -> np.ndarray[Any, Any]:
    """One head of one page, u8 `[block_bytes]`, to `[64, 256]`; see kv_format.cuh."""
    token = np.arange(PAGE_TOKENS)
    if form is KvFormat.BF16:
        chunks = block.view(np.uint16).reshape(4, PAGE_TOKENS, 8, 8)
        place = np.arange(8) ^ (token & 7)[:, None]
        rows = np.take_along_axis(chunks, place[None, :, :, None], axis=2)
        return from_bf16(rows.transpose(1, 0, 2, 3).reshape(PAGE_TOKENS, HEAD_DIM))
    swizzle = (((token >> 1) & 3) << 1) ^ ((token & 1) << 2)
    row_bytes = 128 if form is KvFormat.Q4_0 else 256
    chunks = block[: PAGE_TOKENS * row_bytes].reshape(PAGE_TOKENS, row_bytes // 16, 16)
    place = np.arange(row_bytes // 16) ^ swizzle[:, None]
    rows = np.take_along_axis(chunks, place[:, :, None], axis=1).reshape(PAGE_TOKENS, row_bytes)
    if form is KvFormat.FP8:
        return fp8_table()[rows]
    scales = block[PAGE_TOKENS * row_bytes :].view(np.float16).reshape(PAGE_TOKENS, 8)
    if form is KvFormat.Q8_0:
        levels = rows.astype(np.float64) - 128
    else:
        words = np.ascontiguousarray(rows).view(np.uint32)
        nibbles = (words[..., None] >> (4 * np.array([0, 4, 1, 5, 2, 6, 3, 7]))) & 15
        levels = nibbles.reshape(PAGE_TOKENS, HEAD_DIM).astype(np.float64) - 8
    return levels * np.repeat(scales.astype(np.float64), 32, axis=1)


class Case(NamedTuple):
    """Sequences whose keys and values were appended, and all that attention needs of them."""

    layout: KvLayout
    q_heads: int
    projections: DeviceArray
    positions: DeviceArray
    rows: np.ndarray[Any, Any]
    queries: DeviceArray
    page_table: DeviceArray
    pool: DeviceArray

    def arguments(self) -> tuple[Any, ...]:
        return self.queries, self.projections, self.positions, self.page_table, self.pool


LAYER = 1
EPS = 1e-6
FREQUENCIES = 1e7 ** (-np.arange(32) / 32)


def make_case(
    device: Device,
    compiler: Compiler,
    formats: tuple[KvFormat, KvFormat],
    lengths: list[int],
    heads: tuple[int, int] = (24, 4),
    projection: ElementType = F32,
    seed: int = 0,
) -> Case:
    """Append `lengths[i]` tokens of sequence i, rows of all sequences one after the other."""
    rng = np.random.default_rng(seed)
    q_heads, kv_heads = heads
    layout = KvLayout(2, kv_heads, *formats)
    num_pages = [-(-n // PAGE_TOKENS) for n in lengths]
    order = rng.permutation(sum(num_pages) + 3)
    table = np.full((len(lengths), max(num_pages)), -1, np.int32)
    for line, first, count in zip(table, np.cumsum([0, *num_pages]), num_pages, strict=False):
        line[:count] = order[first : first + count]
    columns = (2 * q_heads + 2 * kv_heads) * HEAD_DIM + 8
    rows = rng.normal(size=(sum(lengths), columns)).astype(np.float32)
    rows = rows.astype(projection.carrier)
    projections = device.to_device(rows, projection)
    positions = device.to_device(np.concatenate([np.arange(n) for n in lengths]).astype(np.int32))
    sequences = device.to_device(np.repeat(np.arange(len(lengths)), lengths).astype(np.int32))
    page_table = device.to_device(table)
    # NaN in every format: nothing may read what was not appended.
    pool = device.allocate((len(order), layout.page_bytes), np.uint8)
    device.fill(pool, 0xFF)
    query_type = BF16 if layout.queries_are_bf16 else ElementType.F16
    queries = device.allocate((sum(lengths), q_heads, HEAD_DIM), query_type)
    device.fill(queries, 0xFF)
    norms = [device.to_device(w) for w in norm_weights()]
    append = KvAppend(device, compiler, layout, projection)
    append(
        projections, positions, sequences, page_table, pool, LAYER, queries, (norms[0], norms[1]),
        device.to_device(FREQUENCIES.view(np.uint64)), 1.0, EPS,
    )  # fmt: skip
    return Case(layout, q_heads, projections, positions, rows, queries, page_table, pool)


def norm_weights() -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).normal(1, 0.3, size=(2, HEAD_DIM)).astype(np.float32)


def cached(device: Device, case: Case, sequence: int, length: int) -> Any:
    """Keys and values `[2][length, kv_heads, 256]` as the pages hold them."""
    pool = device.to_host(case.pool)
    table = device.to_host(case.page_table)[sequence]
    layout = case.layout
    out = []
    for which, form in enumerate((layout.k_format, layout.v_format)):
        plane = layout.layer_offset(LAYER) + which * layout.kv_heads * layout.k_format.block_bytes
        heads = []
        for head in range(layout.kv_heads):
            start = plane + head * form.block_bytes
            blocks = [pool[p, start : start + form.block_bytes] for p in table if p >= 0]
            heads.append(np.concatenate([unpack_block(b, form) for b in blocks])[:length])
        out.append(np.stack(heads, axis=1).astype(np.float64))
    return out


def queries_of(device: Device, case: Case) -> np.ndarray[Any, Any]:
    bits = device.to_host(case.queries)
    return (from_bf16(bits) if case.queries.dtype is BF16 else bits).astype(np.float64)


def expected(
    q: np.ndarray[Any, Any],
    rows: np.ndarray[Any, Any],
    keys: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
    first: int,
) -> np.ndarray[Any, Any]:
    """softmax(q kᵀ / 16, causal) v · sigmoid(gate) for rows from position `first`, float64."""
    count, q_heads, _ = q.shape
    group = q_heads // keys.shape[1]
    gate = rows[:, : q_heads * 2 * HEAD_DIM].reshape(count, q_heads, 2, HEAD_DIM)[:, :, 1]
    scores = np.einsum("thd,shd->hts", q, np.repeat(keys, group, axis=1)) / 16
    late = np.arange(len(keys)) > (first + np.arange(count))[:, None]
    scores = np.where(late, -np.inf, scores)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", shares, np.repeat(values, group, axis=1))
    return mixed / (1 + np.exp(-gate.astype(np.float64)))


def relative_error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def decode(
    device: Device,
    compiler: Compiler,
    case: Case,
    rows: list[int],
    lines: list[int],
    output_type: ElementType = ElementType.F32,
) -> Any:
    """Attention of appended rows, each over the pages of its line, as one batch."""
    batch = len(rows)
    queries = device.to_device(device.to_host(case.queries)[rows], case.queries.dtype)
    projections = device.to_device(device.to_host(case.projections)[rows], case.projections.dtype)
    positions = device.to_device(device.to_host(case.positions)[rows])
    table = device.to_device(device.to_host(case.page_table)[lines])
    kernel = AttentionDecode(
        device, compiler, case.layout, case.q_heads, batch, case.projections.dtype, output_type
    )
    output = empty_output(device, case, batch, output_type)
    kernel(queries, projections, positions, table, case.pool, LAYER, output)
    return host_output(device, output, case, batch, panel_values)


def empty_output(device: Device, case: Case, rows: int, output_type: ElementType) -> DeviceArray:
    shape: tuple[int, ...] = (rows, case.q_heads, HEAD_DIM)
    if output_type is F16:
        shape = (padded_tokens(rows), case.q_heads * HEAD_DIM)
    output = device.allocate(shape, output_type)
    device.fill(output, 0xFF)
    return output


def host_output(
    device: Device, output: DeviceArray, case: Case, rows: int, of_operand: Callable[..., Any]
) -> Any:
    values = device.to_host(output)
    if output.dtype is not F16:
        return values
    columns = case.q_heads * HEAD_DIM
    return of_operand(values.view(np.uint8), rows, columns).reshape(rows, -1, HEAD_DIM)


def prefill(
    device: Device,
    compiler: Compiler,
    case: Case,
    spans: list[tuple[int, int, int, int]],
    portable: bool,
    output_type: ElementType = ElementType.F32,
    num_slots: int = 64,
) -> Any:
    projection = case.projections.dtype
    group = case.q_heads // case.layout.kv_heads
    shared = device.shared_bytes_per_block
    chosen = attention_prefill.variant(case.layout, group, projection, output_type, shared)
    scratch = device.allocate((num_slots * case.q_heads * PARTIAL_BYTES,), np.uint8)
    device.fill(scratch, 0xFF)
    kernel = AttentionPrefill(
        *(device, compiler, case.layout, case.q_heads, projection, output_type, scratch),
        chosen if portable else None,
    )
    rows = case.queries.shape[0]
    output = empty_output(device, case, rows, output_type)
    items, merges = (device.to_device(lines) for lines in kernel.dealer.deal(spans))
    kernel(
        case.queries, case.projections, items, merges, case.page_table, case.pool, LAYER, output
    )  # fmt: skip
    return host_output(device, output, case, rows, chunk_values)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("formats", COMPILED, ids=lambda f: f"{f[0].name}-{f[1].name}")
def test_compiles_within_the_spill_budget(arch: str, formats: tuple[KvFormat, KvFormat]) -> None:
    layout = KvLayout(16, 4, *formats)
    shared = BYTES_OF_ARCH.get(arch, SMALL_SHARED)
    compiler = Compiler(arch, None)
    shape = attention_decode.choose_shape(layout, 6, 132, shared)
    tiled = attention_prefill.variant(layout, 6, F16, F16, shared)
    variants = [
        (kv_append.SOURCE, kv_append.defines(layout, F32), 48),
        (attention_decode.SOURCE, attention_decode.defines(layout, 6, shape, F32, F16), 0),
        (tiled.source, tiled.defines, SPILL_BUDGET[tiled.heads]),
    ]
    if attention_prefill_wgmma.fits(arch, 6):
        hopper = attention_prefill_wgmma.variant(layout, 6, F16, F16)
        variants.append((hopper.source, hopper.defines, WGMMA_SPILL_BUDGET))
    for source, defines, budget in variants:
        report = compiler.report(source, defines)
        assert not report.serialized_wgmma
        for resources in report.kernels.values():
            assert resources.spill_bytes <= budget


def test_query_tiles_lie_on_the_grid() -> None:
    tiles = query_tiles([(0, 100, 70, 0), (70, 0, 64, 1), (134, 128, 1, 2)])
    assert tiles.tolist() == [[70, 0, 64, 1], [0, 100, 28, 0], [28, 128, 42, 0], [134, 128, 1, 2]]


@pytest.mark.gpu
@pytest.mark.parametrize("formats", MIXED, ids=FORMAT_IDS)
@pytest.mark.parametrize("projection", [F32, F16], ids=["f32", "f16"])
def test_append(
    device: Device,
    compiler: Compiler,
    formats: tuple[KvFormat, KvFormat],
    projection: ElementType,
) -> None:
    length = 131
    case = make_case(device, compiler, formats, [length], projection=projection)
    kv_heads = case.layout.kv_heads
    flat = case.rows.astype(np.float64)
    edges = [2 * case.q_heads * HEAD_DIM, (2 * case.q_heads + kv_heads) * HEAD_DIM]
    q = flat[:, : edges[0]].reshape(length, case.q_heads, 2, HEAD_DIM)[:, :, 0]
    k = flat[:, edges[0] : edges[1]].reshape(length, kv_heads, HEAD_DIM)
    v = flat[:, edges[1] : edges[1] + kv_heads * HEAD_DIM].reshape(length, kv_heads, HEAD_DIM)
    angles = np.arange(length)[:, None, None] * FREQUENCIES
    for index, weight in enumerate(norm_weights().astype(np.float64)):
        x = (q, k)[index]
        x *= weight / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        first, second = x[..., :32].copy(), x[..., 32:64].copy()
        x[..., :32] = first * np.cos(angles) - second * np.sin(angles)
        x[..., 32:64] = second * np.cos(angles) + first * np.sin(angles)
    got_k, got_v = cached(device, case, 0, length)
    assert relative_error(queries_of(device, case), q) < 3e-3
    tolerance = {KvFormat.BF16: 3e-3, KvFormat.Q8_0: 8e-3, KvFormat.FP8: 0.04, KvFormat.Q4_0: 0.12}
    assert relative_error(got_k, k) < tolerance[formats[0]]
    assert relative_error(got_v, v) < tolerance[formats[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("formats", MIXED, ids=FORMAT_IDS)
@pytest.mark.parametrize("heads", [(24, 4), (32, 2), (4, 2), (8, 2)], ids=str)
def test_decode(
    device: Device,
    compiler: Compiler,
    formats: tuple[KvFormat, KvFormat],
    heads: tuple[int, int],
) -> None:
    lengths = [1, 16, 63, 64, 65, 777, 1500]
    case = make_case(device, compiler, formats, lengths, heads)
    last = [int(n) - 1 for n in np.cumsum(lengths)]
    out = decode(device, compiler, case, last, list(range(len(lengths))))
    q = queries_of(device, case)
    for line, (row, length) in enumerate(zip(last, lengths, strict=True)):
        keys, values = cached(device, case, line, length)
        want = expected(q[[row]], case.rows[[row]], keys, values, length - 1)
        assert relative_error(out[[line]], want) < 4e-3, length
        alone = decode(device, compiler, case, [row], [line])
        assert alone.tobytes() == out[line].tobytes(), length


@pytest.mark.gpu
@pytest.mark.parametrize("formats", MIXED, ids=FORMAT_IDS)
@pytest.mark.parametrize("heads", [(24, 4), (4, 2), (32, 2)], ids=str)
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "best"])
def test_prefill(
    device: Device,
    compiler: Compiler,
    formats: tuple[KvFormat, KvFormat],
    heads: tuple[int, int],
    portable: bool,
) -> None:
    lengths = [5, 64, 321, 200]
    case = make_case(device, compiler, formats, lengths, heads)
    starts = [0, *np.cumsum(lengths)]
    spans = [(int(starts[i]), 0, n, i) for i, n in enumerate(lengths)]
    out = prefill(device, compiler, case, spans, portable)
    q = queries_of(device, case)
    for line, (row, _, length, _) in enumerate(spans):
        keys, values = cached(device, case, line, length)
        part = slice(row, row + length)
        want = expected(q[part], case.rows[part], keys, values, 0)
        assert relative_error(out[part], want) < 4e-3, length
    row = spans[2][0]
    resumed = prefill(device, compiler, case, [(row + 192, 192, 129, 2)], portable)
    assert resumed[row + 192 : row + 321].tobytes() == out[row + 192 : row + 321].tobytes()
    short = prefill(device, compiler, case, [(row + 64, 64, 7, 2)], portable)
    assert short[row + 64 : row + 71].tobytes() == out[row + 64 : row + 71].tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("formats", COMPILED, ids=lambda f: f"{f[0].name}-{f[1].name}")
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "best"])
def test_segments_of_keys_are_joined_with_the_same_bits(
    device: Device,
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    formats: tuple[KvFormat, KvFormat],
    portable: bool,
) -> None:
    """In parts of two pages, and as whole tiles where there are no slots for parts."""
    monkeypatch.setattr(attention_tiles, "SEGMENT_PAGES", 2)
    lengths = [70, 700, 256]
    case = make_case(device, compiler, formats, lengths)
    starts = [0, *np.cumsum(lengths)]
    spans = [(int(starts[i]), 0, n, i) for i, n in enumerate(lengths)]
    q = queries_of(device, case)
    whole = prefill(device, compiler, case, spans, portable, num_slots=24)
    for line, (row, _, length, _) in enumerate(spans):
        keys, values = cached(device, case, line, length)
        part = slice(row, row + length)
        want = expected(q[part], case.rows[part], keys, values, 0)
        assert relative_error(whole[part], want) < 4e-3, length
    row = spans[1][0]
    for first, count in ((640, 60), (128, 1), (192, 130)):
        part = slice(row + first, row + first + count)
        parts = prefill(device, compiler, case, [(part.start, first, count, 1)], portable)
        assert parts[part].tobytes() == whole[part].tobytes(), first


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 3000)), min_size=1, max_size=5),
    st.integers(1, 16),
    st.integers(40, 400),
)
def test_every_segment_of_every_tile_is_dealt_once(
    spans: list[tuple[int, int]], blocks: int, num_slots: int
) -> None:
    rows = [0, *np.cumsum([count for _, count in spans]).tolist()]
    numbered = [(rows[i], first, count, i) for i, (first, count) in enumerate(spans)]
    dealt = TileDealer(blocks, 132, num_slots).deal(numbered)
    segment = attention_tiles.SEGMENT_PAGES * PAGE_TOKENS
    counts = {tuple(tile): tile[1] // segment + 1 for tile in query_tiles(numbered).tolist()}
    done = [
        (tuple(line[:4]), number) for line in dealt.items.tolist() for number in range(*line[4:6])
    ]
    assert sorted(done) == sorted((t, i) for t, count in counts.items() for i in range(count))
    merged = {tuple(line[:4]): line[6:] for line in dealt.merges.tolist()}
    assert set(merged) == {tile for tile, count in counts.items() if count > 1}
    in_parts = len(dealt.items) > len(counts)
    used = []
    for line in dealt.items.tolist():
        tile, first, end, slot = tuple(line[:4]), *line[4:7]
        if counts[tile] == 1:
            continue
        assert end - first == (1 if in_parts else counts[tile])
        assert slot == merged[tile][0] + (first if in_parts else 0)
        used.append(slot)
        assert merged[tile][1] == (counts[tile] if in_parts else 1)
    assert len(used) == len(set(used))
    assert not in_parts or max(used) < num_slots


def test_a_short_prompt_after_many_keys_is_dealt_in_parts() -> None:
    dealer = TileDealer(12, 132, 96)
    assert len(dealer.deal([(0, 53_120, 23, 0)]).items) == 7
    assert len(dealer.deal([(0, 0, 4096, 0)]).items) == 64
    assert len(dealer.deal([(0, 24_576, 4096, 0)]).items) == 64


@pytest.mark.gpu
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "best"])
def test_an_operand_holds_the_same_outputs(
    device: Device, compiler: Compiler, portable: bool
) -> None:
    lengths = [70, 5, 130]
    case = make_case(device, compiler, MIXED[1], lengths, (24, 4))
    last = [int(n) - 1 for n in np.cumsum(lengths)]
    lines = list(range(len(lengths)))
    expected = decode(device, compiler, case, last, lines)
    got = decode(device, compiler, case, last, lines, F16)
    np.testing.assert_array_equal(got, (expected / 8).astype(np.float16).astype(np.float32) * 8)
    spans = [(0, 0, 70, 0), (70, 0, 5, 1), (75, 0, 130, 2)]
    expected = prefill(device, compiler, case, spans, portable)
    got = prefill(device, compiler, case, spans, portable, F16)
    np.testing.assert_array_equal(got, (expected / 8).astype(np.float16).astype(np.float32) * 8)
