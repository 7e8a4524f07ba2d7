"""The device's sampler against the engine's: the same stages, the same random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from daemon.engine import sampler
from daemon.engine.backends.backend import SamplingRow
from daemon.engine.requests import SamplingParams
from daemon.kernels import sample
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler
from daemon.kernels.sample import Choice, Sample

if TYPE_CHECKING:
    from daemon.kernels.runtime.device import Device

VOCAB, NUM_TOKENS = 248_320, 248_077

CASES = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=3.0),
    "default": SamplingParams(temperature=1.0, top_k=20, top_p=0.95),
    "one": SamplingParams(top_k=1),
    "nucleus": SamplingParams(temperature=0.7, top_p=0.8),
    "no-nucleus": SamplingParams(top_p=0.0),
    "floor": SamplingParams(min_p=0.05),
    "everything": SamplingParams(
        temperature=0.8, top_k=500, top_p=0.9, min_p=0.01, repetition_penalty=1.3,
        presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((5, 4.0), (77, -100.0)),
    ),
    "wide": SamplingParams(top_k=200_000, top_p=0.999),
    "logprobs": SamplingParams(top_k=40, logprobs=20),
    "chosen": SamplingParams(temperature=0, logprobs=0),
}  # fmt: skip


def as_choice(row: SamplingRow) -> Choice:
    p = row.params
    return Choice(
        p.temperature, p.top_k, p.top_p, p.min_p,
        p.repetition_penalty, p.presence_penalty, p.frequency_penalty, row.seed, row.step,
        {token: reply for token, (_, reply) in row.counts.items()},
        {token: amount for token, amount in p.logit_bias if token < NUM_TOKENS}, p.logprobs,
        row.mask,
    )  # fmt: skip


def random_logits(rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Like a model's: a broad bulk, a few tokens far above it, many exact ties (they are bf16)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, (rows, VOCAB)).astype(np.float32)
    logits[:, rng.integers(0, NUM_TOKENS, 60)] += rng.exponential(4, 60).astype(np.float32)
    logits[:, NUM_TOKENS:] = 50
    return (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)


def assert_drawn(logits: np.ndarray[Any, Any], row: SamplingRow, token: int) -> None:
    """The token whose interval of the running sum holds the random number, to 1e-5."""
    adjusted = sampler.bias(sampler.penalize(logits, row), row.params)
    adjusted = sampler.masked(adjusted, row.mask)
    if row.params.temperature == 0:
        assert token == adjusted.argmax()
        return
    ids, shares = sampler.candidates(adjusted, row.params)
    (index,) = np.flatnonzero(ids == token)
    end = shares[: index + 1].sum()
    number = sampler.uniform(row.seed, row.step)
    assert end - shares[index] - 1e-5 <= number <= end + 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    report = Compiler(arch, None).report(sample.SOURCE, sample.defines(VOCAB, 16))
    assert report.kernels["sample"].spill_bytes == 0


@pytest.mark.gpu
def test_agrees_with_the_engines_sampler(device: Device, compiler: Compiler) -> None:
    choose = Sample(device, compiler, VOCAB, 16)
    rng = np.random.default_rng(1)
    for trial in range(4):
        logits = random_logits(len(CASES), trial)
        rows = []
        for params in CASES.values():
            seen = rng.integers(0, NUM_TOKENS, 300).tolist()
            counts = {int(t): (2, int(t) % 3) for t in seen}
            uses = params.repetition_penalty != 1
            rows.append(
                SamplingRow(params, int(rng.integers(2**63)), trial, counts if uses else {})
            )
        on_device = device.to_device(logits)
        chosen = choose(on_device, [as_choice(row) for row in rows], NUM_TOKENS)
        exact = 0
        for line, row, got in zip(logits[:, :NUM_TOKENS], rows, chosen, strict=True):
            want = sampler.sample(line, row)
            assert_drawn(line, row, got.token)
            exact += want.token == got.token
            if row.params.logprobs is not None:
                logprobs = sampler.report(line, got.token, row.params.logprobs)
                assert logprobs is not None
                assert abs(got.logprob - logprobs.chosen) < 1e-4
                assert [i for i, _ in got.alternatives] == [i for i, _ in logprobs.alternatives]
                np.testing.assert_allclose(
                    [p for _, p in got.alternatives],
                    [p for _, p in logprobs.alternatives],
                    atol=1e-4,
                )
        assert exact >= len(rows) - 1
        alone = choose(on_device.rows(3, 4), [as_choice(rows[3])], NUM_TOKENS)
        assert alone == [chosen[3]]


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, -3.5, 1e6], ids=str)
def test_all_equal_logits(device: Device, compiler: Compiler, value: float) -> None:
    logits = device.to_device(np.full((2, VOCAB), value, np.float32))
    choose = Sample(device, compiler, VOCAB, 2)
    rows = [SamplingRow(SamplingParams(temperature=t), 11, 3, {}) for t in (0.0, 1.0)]
    greedy, drawn = choose(logits, [as_choice(row) for row in rows], NUM_TOKENS)
    assert greedy.token == 0
    assert abs(drawn.token - sampler.uniform(11, 3) * NUM_TOKENS) < 2


def mask_of(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    bits = np.zeros(VOCAB, np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.mark.gpu
@pytest.mark.parametrize("num_allowed", [1, 7, 5_000, NUM_TOKENS])
def test_masked_rows_among_others(device: Device, compiler: Compiler, num_allowed: int) -> None:
    choose = Sample(device, compiler, VOCAB, 16)
    rng = np.random.default_rng(num_allowed)
    logits = random_logits(len(CASES), num_allowed)
    allowed = [rng.choice(NUM_TOKENS, num_allowed, replace=False) for _ in CASES]
    rows = [
        SamplingRow(params, int(rng.integers(2**63)), 5, {}, mask_of(tokens) if i % 3 else None)
        for i, (params, tokens) in enumerate(zip(CASES.values(), allowed, strict=True))
    ]
    on_device = device.to_device(logits)
    for _ in range(2):
        chosen = choose(on_device, [as_choice(row) for row in rows], NUM_TOKENS)
        for line, row, tokens, got in zip(logits, rows, allowed, chosen, strict=True):
            assert_drawn(line[:NUM_TOKENS], row, got.token)
            assert row.mask is None or got.token in tokens
    alone = choose(on_device.rows(4, 5), [as_choice(rows[4])], NUM_TOKENS)
    assert alone == [chosen[4]]
