"""Gated delta net kernels: decode step and prefill against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from quant_reference import chunk_values, panel_values

pytest.importorskip("cuda.core")

from daemon.errors import UnsupportedModel
from daemon.kernels import delta_prefill, delta_step
from daemon.kernels.delta_prefill import (
    DeltaPrefill,
    PrefillSpan,
    PrefillTables,
    chunk_tables,
    workspace_bytes,
)
from daemon.kernels.delta_state import (
    CONV_RING,
    Columns,
    DeltaConstants,
    DeltaInputs,
    DeltaSizes,
    DeltaSlots,
    DeltaTypes,
)
from daemon.kernels.delta_step import DeltaStep
from daemon.kernels.quant_activations import padded_tokens
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

F32, F16 = ElementType.F32, ElementType.F16
TYPES = {
    "f32": DeltaTypes(F32, F32),
    "operand": DeltaTypes(F32, F16),
    "f16": DeltaTypes(F16, F16),
}
TOLERANCES = {F32: 1e-5, F16: 5e-4}
"""Of the norm of decoded outputs: one rounding to the output's type."""
EPS = 1e-6
SPILL_BUDGET = 64
NUM_SLOTS, NUM_LAYERS, LAYER = 8, 2, 1
Floats = np.ndarray


class Layer(NamedTuple):
    """A layer's random weights, float32."""

    taps: Floats
    rates: Floats
    dt_bias: Floats
    norm: Floats


class Rows(NamedTuple):
    """Projections of consecutive tokens; values that fp16 can hold."""

    qkv: Floats
    z: Floats
    beta: Floats
    alpha: Floats

    def part(self, start: int, stop: int) -> Rows:
        return Rows(*(x[start:stop] for x in self))


def joined(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def random_layer(sizes: DeltaSizes, rng: np.random.Generator) -> Layer:
    heads = sizes.num_v_heads
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), heads))
    return Layer(
        rng.normal(0, 0.5, (sizes.conv_dim, 4)).astype(np.float32),
        -rng.uniform(0.01, 16, heads).astype(np.float32),
        np.log(np.expm1(dt)).astype(np.float32),
        rng.normal(1, 0.2, 128).astype(np.float32),
    )


def random_rows(sizes: DeltaSizes, num: int, rng: np.random.Generator) -> Rows:
    def rounded(*shape: int) -> Floats:
        return rng.normal(0, 1, shape).astype(np.float16).astype(np.float32)

    heads = sizes.num_v_heads
    return Rows(
        rounded(num, sizes.conv_dim),
        rounded(num, sizes.value_size),
        rounded(num, heads),
        rounded(num, heads),
    )


def recurrence(
    sizes: DeltaSizes, layer: Layer, rows: Rows, past: Floats, rule: Floats
) -> tuple[Floats, Floats]:
    """Outputs `[tokens, v_heads * 128]` and the state after them, float64, token by token.

    `past` are the three rows before; `rule` `[v_heads, 128 k, 128 v]`.
    """
    taps, rates, dt_bias, norm = (x.astype(np.float64) for x in layer)
    qkv = np.concatenate([past, rows.qkv]).astype(np.float64)
    num = len(rows.qkv)
    mixed = sum(taps[:, j] * qkv[j : j + num] for j in range(4))
    mixed = mixed / (1 + np.exp(-mixed))
    key_size = sizes.num_k_heads * 128
    q, k, v = np.split(mixed, [key_size, 2 * key_size], axis=-1)
    repeat = sizes.num_v_heads // sizes.num_k_heads

    def heads(x: Floats) -> Floats:
        x = x.reshape(num, sizes.num_k_heads, 128)
        x = x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)
        return np.tile(x, (1, repeat, 1))

    q, k, v = heads(q) / np.sqrt(128), heads(k), v.reshape(num, sizes.num_v_heads, 128)
    beta = 1 / (1 + np.exp(-rows.beta.astype(np.float64)))
    decay = np.exp(rates * np.logaddexp(0, rows.alpha + dt_bias))
    rule = rule.astype(np.float64)
    out = np.empty_like(v)
    for t in range(num):
        rule = rule * decay[t][:, None, None]
        error = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], rule))
        rule = rule + k[t][:, :, None] * error[:, None, :]
        out[t] = np.einsum("hk,hkv->hv", q[t], rule)
    out /= np.sqrt(np.mean(out * out, -1, keepdims=True) + EPS)
    gate = rows.z.astype(np.float64)
    gate = gate / (1 + np.exp(-gate))
    return (out * norm).reshape(num, -1) * gate, rule


def relative_error(got: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class Bench:
    """Everything on the device that the kernels need, with host views of slots and outputs."""

    def __init__(
        self, device: Device, compiler: Compiler, sizes: DeltaSizes, types: DeltaTypes, layer: Layer
    ) -> None:
        self.device, self.sizes, self.types = device, sizes, types
        self.constants = DeltaConstants(*(device.to_device(x) for x in layer))
        size = DeltaSlots.slot_bytes(sizes, NUM_LAYERS)
        memory = device.allocate((NUM_SLOTS * size,), ElementType.U8)
        device.fill(memory, 0xFF)
        self.states = DeltaSlots(memory, sizes, NUM_LAYERS, NUM_SLOTS)
        self.step = DeltaStep(device, compiler, sizes, types, EPS)
        workspace = device.allocate((workspace_bytes(sizes, 24),), ElementType.U8)
        device.fill(workspace, 0xFF)
        self.prefill = DeltaPrefill(device, compiler, sizes, types, EPS, workspace)
        for slot in range(4):
            self.states.clear(device, slot)

    def decode(
        self, rows: Rows, slots: list[int], positions: list[int], captures: list[int] | None = None
    ) -> Floats:
        out = self._output(len(slots))
        tables = (slots, captures or [-1] * len(slots), positions)
        arrays = [self.device.to_device(np.array(x, np.int32)) for x in tables]
        self.step(self._inputs(rows), self.constants, self.states, LAYER, *arrays, out)
        return self._host(out, len(slots), panel_values)

    def fill(self, rows: Rows, spans: list[PrefillSpan]) -> Floats:
        out = self._output(len(rows.qkv))
        tables = PrefillTables(*(self.device.to_device(x) for x in chunk_tables(spans)))
        self.prefill(self._inputs(rows), self.constants, self.states, LAYER, tables, out)
        return self._host(out, len(rows.qkv), chunk_values)

    def rule(self, slot: int) -> Floats:
        values, stride = self.states.rules(LAYER)
        size = self.sizes.rule_floats
        part = values.view((size,), F32, slot * stride * 4)
        return self.device.to_host(part).reshape(self.sizes.num_v_heads, 128, 128)

    def slot_bytes(self, slot: int) -> bytes:
        return self.device.to_host(self.states.slot(slot)).tobytes()

    def _inputs(self, rows: Rows) -> DeltaInputs:
        packed = np.concatenate(rows, axis=1)
        padding = np.full((len(packed), -packed.shape[1] % 4), np.nan)
        packed = np.concatenate([packed, padding], axis=1)
        self._kept = self.device.to_device(packed.astype(self.types.projections.carrier))
        return DeltaInputs.of_rows(self._kept, self.sizes)

    def _output(self, num_rows: int) -> DeviceArray:
        padded = padded_tokens(num_rows) if self.types.outputs is F16 else num_rows
        out = self.device.allocate((padded, self.sizes.value_size), self.types.outputs)
        self.device.fill(out, 0xFF)
        return out

    def _host(self, out: DeviceArray, num_rows: int, of_operand: Callable[..., Floats]) -> Floats:
        values = self.device.to_host(out)
        if out.dtype is F16:
            return of_operand(values.view(np.uint8), num_rows, self.sizes.value_size)
        return values


SIZES = [DeltaSizes(2, 6), DeltaSizes(16, 16), DeltaSizes(4, 8)]


@pytest.fixture(params=list(TYPES))
def types(request: pytest.FixtureRequest) -> DeltaTypes:
    return TYPES[request.param]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
def test_decoding_follows_the_recurrence(
    device: Device, compiler: Compiler, sizes: DeltaSizes, types: DeltaTypes
) -> None:
    rng = np.random.default_rng(1)
    layer = random_layer(sizes, rng)
    bench = Bench(device, compiler, sizes, types, layer)
    num_tokens, slots = 9, [2, 0, 3]
    sequences = [random_rows(sizes, num_tokens, rng) for _ in slots]
    got = np.empty((len(slots), num_tokens, sizes.value_size))
    for t in range(num_tokens):
        rows = Rows(
            *(np.concatenate(x) for x in zip(*(s.part(t, t + 1) for s in sequences), strict=True))
        )
        capture = [-1, 5, -1] if t == 4 else None
        got[:, t] = bench.decode(rows, slots, [t] * 3, capture)
    zeros = np.zeros((3, sizes.conv_dim)), np.zeros((sizes.num_v_heads, 128, 128))
    for i, slot in enumerate(slots):
        out, rule = recurrence(sizes, layer, sequences[i], *zeros)
        assert relative_error(got[i], out) < TOLERANCES[types.outputs]
        assert relative_error(bench.rule(slot), rule) < 1e-5
    _, rule = recurrence(sizes, layer, sequences[1].part(0, 5), *zeros)
    assert relative_error(bench.rule(5), rule) < 1e-5


@pytest.mark.gpu
def test_a_captured_decode_state_goes_on_with_the_same_bits(
    device: Device, compiler: Compiler, types: DeltaTypes
) -> None:
    sizes, rng = SIZES[0], np.random.default_rng(2)
    bench = Bench(device, compiler, sizes, types, random_layer(sizes, rng))
    rows = random_rows(sizes, 7, rng)
    for t in range(6):
        bench.decode(rows.part(t, t + 1), [1], [t], [6] if t == 5 else None)
    assert bench.slot_bytes(6)[: 4 * sizes.rule_floats] == b"\xff" * (4 * sizes.rule_floats)
    expected = bench.decode(rows.part(6, 7), [1], [6])
    assert np.array_equal(bench.decode(rows.part(6, 7), [6], [6]), expected)


@pytest.mark.gpu
def test_a_decoded_row_has_the_same_bits_alone_and_in_a_batch(
    device: Device, compiler: Compiler, types: DeltaTypes
) -> None:
    sizes, rng = SIZES[0], np.random.default_rng(3)
    bench = Bench(device, compiler, sizes, types, random_layer(sizes, rng))
    rows = random_rows(sizes, 8, rng)
    alone = bench.decode(rows.part(2, 3), [0], [70])
    state = bench.rule(0)
    bench.states.clear(device, 0)
    batch = bench.decode(rows, [-1, 1, 0, 2, -1, -1, 3, -1], [70] * 8)
    assert np.array_equal(batch[2], alone[0])
    assert np.array_equal(bench.rule(0), state)
    assert np.all(np.isnan(batch[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lengths", [(1,), (3, 64), (200, 130, 64)])
def test_prefill_follows_the_recurrence(
    device: Device,
    compiler: Compiler,
    sizes: DeltaSizes,
    types: DeltaTypes,
    lengths: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(4)
    layer = random_layer(sizes, rng)
    bench = Bench(device, compiler, sizes, types, layer)
    rows = random_rows(sizes, sum(lengths) + 2, rng)
    starts = np.cumsum([1, *lengths])[:-1]
    captures = [
        ((length // 64 * 64, 4 + i),) if length >= 64 else () for i, length in enumerate(lengths)
    ]
    spans = [
        PrefillSpan(int(start), length, i, captured)
        for i, (start, length, captured) in enumerate(zip(starts, lengths, captures, strict=True))
    ]
    got = bench.fill(rows, spans)
    assert np.all(np.isnan(got[[0, -1]]))
    zeros = np.zeros((3, sizes.conv_dim)), np.zeros((sizes.num_v_heads, 128, 128))
    for span in spans:
        own = rows.part(span.first_row, span.first_row + span.num_tokens)
        out, rule = recurrence(sizes, layer, own, *zeros)
        part = got[span.first_row : span.first_row + span.num_tokens]
        assert relative_error(part, out) < 5e-3
        assert relative_error(bench.rule(span.slot), rule) < 1e-3
        for at, slot in span.captures:
            _, rule = recurrence(sizes, layer, own.part(0, at), *zeros)
            assert relative_error(bench.rule(slot), rule) < 1e-3


@pytest.mark.gpu
def test_decoding_goes_on_after_prefill(
    device: Device, compiler: Compiler, types: DeltaTypes
) -> None:
    sizes, rng = SIZES[0], np.random.default_rng(5)
    layer = random_layer(sizes, rng)
    for length in (1, 2, 66, 192):
        bench = Bench(device, compiler, sizes, types, layer)
        rows = random_rows(sizes, length + 5, rng)
        bench.fill(rows.part(0, length), [PrefillSpan(0, length, 0)])
        got = [bench.decode(rows.part(t, t + 1), [0], [t]) for t in range(length, length + 5)]
        zeros = np.zeros((3, sizes.conv_dim)), np.zeros((sizes.num_v_heads, 128, 128))
        out, _ = recurrence(sizes, layer, rows, *zeros)
        assert relative_error(np.concatenate(got), out[length:]) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [64, 192, 320])
def test_a_resumed_prompt_has_the_same_bits(
    device: Device, compiler: Compiler, types: DeltaTypes, cut: int
) -> None:
    sizes, rng = SIZES[0], np.random.default_rng(6)
    layer = random_layer(sizes, rng)
    bench = Bench(device, compiler, sizes, types, layer)
    rows, other = random_rows(sizes, 350, rng), random_rows(sizes, 100, rng)
    whole = bench.fill(rows, [PrefillSpan(0, 350, 0, ((cut, 5),))])
    both = joined([other, rows.part(cut, 350)])
    spans = [PrefillSpan(0, 100, 1), PrefillSpan(100, 350 - cut, 5)]
    resumed = bench.fill(both, spans)
    assert np.array_equal(resumed[100:], whole[cut:])
    assert np.array_equal(bench.rule(5), bench.rule(0))


@pytest.mark.gpu
def test_equal_keys_that_are_never_forgotten(
    device: Device, compiler: Compiler, types: DeltaTypes
) -> None:
    """The inverse's worst case: I + A is nearly all ones below the diagonal."""
    sizes, rng = SIZES[0], np.random.default_rng(7)
    layer = random_layer(sizes, rng)._replace(rates=np.full(6, -1e-4, np.float32))
    bench = Bench(device, compiler, sizes, types, layer)
    rows = random_rows(sizes, 256, rng)
    keys = slice(2 * 128, 4 * 128)
    rows.qkv[:, keys] = rows.qkv[0, keys]
    rows.beta[:] = 6.0
    out, rule = recurrence(
        sizes, layer, rows, np.zeros((3, sizes.conv_dim)), np.zeros((6, 128, 128))
    )
    got = bench.fill(rows, [PrefillSpan(0, 256, 0)])
    assert relative_error(got, out) < 1e-2
    # Errors of one sign add up over a chunk of equal keys; bf16 operands would give 0.15.
    assert relative_error(bench.rule(0), rule) < 1.5e-2


def test_tables_follow_the_grid() -> None:
    chunks, spans = chunk_tables(
        [PrefillSpan(0, 130, 3, ((128, 7),)), PrefillSpan(130, 64, 2, ((64, 1),))]
    )
    assert chunks.tolist() == [
        [0, 64, 3, -1],
        [64, 64, -1, 7],
        [128, 2, -1, -1],
        [130, 64, 2, 1],
    ]
    assert spans.tolist() == [[0, 3, 3, 0], [3, 1, 2, 0]]


def test_workspace_and_slots_are_as_large_as_promised() -> None:
    sizes = DeltaSizes.checked(16, 48, 128, 128, 4)
    assert workspace_bytes(sizes, 1) == 16 * 32768 + 48 * (32768 + 512)
    slot = DeltaSlots.slot_bytes(sizes, 48)
    assert slot == 48 * (48 * 128 * 128 + CONV_RING * 10240) * 4


def test_parts_of_projected_rows() -> None:
    sizes = DeltaSizes(2, 6)
    rows = DeviceArray(4096, (3, 2064), F16, None)
    inputs = DeltaInputs.of_rows(rows, sizes)
    assert inputs == (
        Columns(4096, 2064),
        Columns(4096 + 1280 * 2, 2064),
        Columns(4096 + (1280 + 768) * 2, 2064),
    )


@pytest.mark.parametrize(
    "wrong",
    [(16, 48, 64, 128, 4), (16, 48, 128, 256, 4), (16, 48, 128, 128, 3), (16, 40, 128, 128, 4)],
)
def test_other_shapes_are_refused(wrong: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(UnsupportedModel):
        DeltaSizes.checked(*wrong)


def test_blocks_fit_the_cards() -> None:
    assert delta_prefill.scan_depth(227 * 1024) == 3
    assert delta_prefill.scan_depth(163 * 1024) == 2
    assert delta_prefill.scan_depth(99 * 1024) == 1
    assert delta_prefill.scan_shared_bytes(1) <= 99 * 1024
    assert delta_prefill.scan_warps(DeltaSizes(16, 48), "sm_80", 108) == 4
    assert delta_prefill.scan_warps(DeltaSizes(16, 16), "sm_80", 108) == 2
    assert delta_prefill.scan_warps(DeltaSizes(2, 6), "sm_90a", 132) == 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch: str) -> None:
    compiler = Compiler(arch, None)
    types = TYPES["f16"].defines
    sources = {
        delta_step.SOURCE: TYPES["operand"].defines,
        delta_prefill.PREPARE: types,
        delta_prefill.SCAN: {**types, "SCAN_WARPS": 4, "DEPTH": 1},
        delta_prefill.GATE: types,
    }
    for source, defines in sources.items():
        report = compiler.report(source, defines)
        assert [r for r in report.kernels.values() if r.spill_bytes > SPILL_BUDGET] == []
        assert not report.serialized_wgmma
