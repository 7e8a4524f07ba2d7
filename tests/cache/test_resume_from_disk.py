"""The real engine on the real store: resumed after a restart equals cold, bit for bit."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cache_harness import open_cache
from engine_harness import EngineHarness, Reply

from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape

MODEL_FILE = Path(__file__).parents[1] / "vectors" / "tiny-coder" / "tiny-coder-BF16.gguf"


@pytest.fixture(scope="module")
def model() -> Model:
    file = open_gguf(MODEL_FILE)
    return load_model(file, NumpyBackend(model_shape(file).rms_eps))


def generate(
    harness: EngineHarness, tokens: Sequence[int], max_tokens: int, boundaries: Sequence[int] = ()
) -> Reply:
    reply = harness.submit(tokens, max_tokens=max_tokens, boundaries=boundaries)
    deadline = time.monotonic() + 200
    while (has_worked := harness.engine.step()) or harness.engine.sequences:
        assert time.monotonic() < deadline
        if not has_worked:
            time.sleep(0.001)  # a checkpoint is being read
    return reply


def on(model: Model, cache: CheckpointCache, strict: bool = False) -> EngineHarness:
    return EngineHarness(model, cache, strict=strict)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_kept", "restarts"), [(449, False), (300, True), (700, True)])
def test_an_edited_prompt_equals_cold(
    model: Model, tmp_path: Path, num_kept: int, restarts: bool
) -> None:
    tokens = [(7 * n) % 5000 for n in range(700)]
    edited = [*tokens[:num_kept], *range(100, 150)]
    cold = EngineHarness(model)
    expected = cold.generate(edited, max_tokens=4)
    cache = open_cache(tmp_path, interval_tokens=256)
    generate(on(model, cache), tokens, 4, boundaries=[100, 450, 690])
    if restarts:
        cache.close()
        cache = open_cache(tmp_path, interval_tokens=256)
    warm = on(model, cache)
    reply = generate(warm, edited, 4)
    assert reply.num_cached == {300: 256, 449: 448, 700: 640}[num_kept]
    assert np.array_equal(warm.last_prompt_logits(edited), cold.last_prompt_logits(edited))
    assert reply.tokens == expected.tokens
    assert cache.stats().num_dropped == cache.stats().num_damaged == 0
    cache.close()


def test_a_reply_goes_on_after_a_restart_and_strict_does_without_it(
    model: Model, tmp_path: Path
) -> None:
    tokens = [(7 * n) % 5000 for n in range(200)]
    cache = open_cache(tmp_path)
    reply = generate(on(model, cache), tokens, 150, boundaries=[190])
    history = [*tokens, *reply.tokens, 5, 6, 7]
    cache.close()
    cache = open_cache(tmp_path)
    assert generate(on(model, cache), history, 1).num_cached == len(history) // 64 * 64
    assert generate(on(model, cache, strict=True), history, 1).num_cached == 128
    assert cache.stats().checkpoints_by_birth["decode"] >= 1
    cache.close()
