"""The GPU against the golden outputs, and its own row invariance: bit for bit, on a real card."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from truths import (
    Golden,
    check_any_timing_equals_cold,
    check_batched_equals_alone,
    check_greedy_tokens,
    check_resumed_equals_cold,
)

from daemon.engine.evaluation import evaluate
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape

pytestmark = pytest.mark.gpu

VECTORS = Path(__file__).parents[1] / "vectors" / "tiny-coder"
LOGIT_BOUND = 0.15
"""fp16 operands and bf16 keys and values, against float32; the logits' spread is about 5."""


@pytest.fixture(scope="module")
def load_on_gpu() -> Callable[[], Model]:
    from daemon.engine.backends.cuda_backend import CudaBackend
    from daemon.engine.backends.cuda_memory import CudaLimits
    from daemon.kernels.runtime.compiler import Compiler
    from daemon.kernels.runtime.device import Device

    device = Device.open()
    compiler = Compiler(device.arch, None)
    file = open_gguf(VECTORS / "tiny-coder-BF16.gguf")

    def load() -> Model:
        limits = CudaLimits(context_length=8192)
        return load_model(file, CudaBackend(device, compiler, limits, model_shape(file).rms_eps))

    return load


@pytest.fixture(scope="module")
def on_gpu(load_on_gpu: Callable[[], Model]) -> Model:
    return load_on_gpu()


@pytest.mark.parametrize("index", range(8))
def test_logits_are_close_to_the_golden_ones(on_gpu: Model, golden: Golden, index: int) -> None:
    logits = evaluate(on_gpu, golden[f"{index}_ids"])
    top = np.take_along_axis(logits, golden[f"{index}_top_ids"], axis=1)
    assert np.abs(top - golden[f"{index}_top_logits"]).max() < LOGIT_BOUND


def test_greedy_tokens_equal_the_golden_ones(on_gpu: Model, golden: Golden) -> None:
    check_greedy_tokens(on_gpu, golden)


@pytest.mark.parametrize(("position", "step"), [(64, 64), (128, 256), (704, 512), (1536, 1024)])
def test_resumed_equals_cold(on_gpu: Model, golden: Golden, position: int, step: int) -> None:
    check_resumed_equals_cold(on_gpu, golden, position, step)


def test_batched_equals_alone(on_gpu: Model, golden: Golden) -> None:
    check_batched_equals_alone(on_gpu, golden)


def test_any_timing_of_restores_equals_cold(on_gpu: Model, golden: Golden) -> None:
    check_any_timing_equals_cold(on_gpu, golden, num_rounds=40)
