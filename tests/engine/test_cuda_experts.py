"""Mixtures of experts on the GPU: close to the reference, and the same bits in any batch."""

from collections.abc import Callable

import numpy as np
import pytest
from builders import PLAIN, Form, resized, write_model
from truths import (
    Golden,
    check_batched_equals_alone,
    check_resumed_equals_cold,
    cold,
    random_prompts,
)

from benchmarks.model_sizes import TINY_MOE, ModelSizes
from daemon.engine.backends.backend import Backend
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.evaluation import evaluate
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape

pytestmark = pytest.mark.gpu

LOGIT_BOUND = 0.1
"""fp16 operands and bf16 keys and values, against float32; the logits' spread is about 1."""

SMALL = resized(TINY_MOE, vocab=2048)
ALL_USED = resized(SMALL, experts=6, experts_used=6, shared_dim=512)
"""Nothing is chosen, so that no rounding can change a choice."""


def prompts() -> Golden:
    return random_prompts(SMALL.vocab)


@pytest.fixture(scope="module")
def backend() -> Callable[[float], Backend]:
    from daemon.engine.backends.cuda_backend import CudaBackend
    from daemon.engine.backends.cuda_memory import CudaLimits
    from daemon.kernels.runtime.compiler import Compiler
    from daemon.kernels.runtime.device import Device

    device = Device.open()
    compiler = Compiler(device.arch, None)
    limits = CudaLimits(context_length=8192)
    return lambda rms_eps: CudaBackend(device, compiler, limits, rms_eps)


Loaded = tuple[Model, Model]


@pytest.fixture(scope="module")
def load(
    backend: Callable[[float], Backend], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[ModelSizes, str, Form], Loaded]:
    """A random model on the GPU and in NumPy."""

    def load(sizes: ModelSizes, mix: str, form: Form = PLAIN) -> Loaded:
        path = tmp_path_factory.mktemp("experts") / "random.gguf"
        file = open_gguf(write_model(path, sizes, mix, form))
        eps = model_shape(file).rms_eps
        return load_model(file, backend(eps)), load_model(file, NumpyBackend(eps))

    return load


@pytest.fixture(scope="module")
def routed(load: Callable[..., Loaded]) -> Loaded:
    return load(SMALL, "q4_k_m")


@pytest.mark.parametrize(
    ("mix", "form"),
    [
        ("q4_k_m", PLAIN),
        ("iq4_xs", PLAIN),
        ("bf16", Form(fused_gate_up=True)),
        ("f32", Form(fused_gate_up=True)),
    ],
)
def test_logits_are_close_where_every_expert_is_used(
    load: Callable[..., Loaded], mix: str, form: Form
) -> None:
    on_gpu, reference = load(ALL_USED, mix, form)
    ids = prompts()["5_ids"]
    assert np.abs(evaluate(on_gpu, ids) - evaluate(reference, ids)).max() < LOGIT_BOUND


def test_logits_are_close_but_for_choices_on_the_edge(routed: Loaded) -> None:
    ids = prompts()["5_ids"]
    on_gpu, reference = (evaluate(model, ids) for model in routed)
    of_row = np.abs(on_gpu - reference).max(-1)
    assert np.quantile(of_row, 0.9) < LOGIT_BOUND


def test_greedy_tokens_equal_the_reference_while_they_are_clear(
    load: Callable[..., Loaded],
) -> None:
    on_gpu, reference = load(ALL_USED, "q4_k_m")
    num_compared = 0
    for ids in prompts().values():
        _, expected = cold(reference, ids, max_tokens=8)
        whole = np.concatenate([ids, np.asarray(expected, np.int32)])
        top = np.sort(evaluate(reference, whole)[len(ids) - 1 : -1], -1)
        is_clear = top[:, -1] - top[:, -2] > 2 * LOGIT_BOUND
        num_clear = int(np.cumprod(is_clear).sum())
        assert cold(on_gpu, ids, max_tokens=8)[1][:num_clear] == expected[:num_clear]
        num_compared += num_clear
    assert num_compared >= 8


@pytest.mark.parametrize(("position", "step"), [(64, 64), (128, 256), (640, 512)])
def test_resumed_equals_cold(routed: Loaded, position: int, step: int) -> None:
    check_resumed_equals_cold(routed[0], prompts(), position, step)


def test_batched_equals_alone(routed: Loaded) -> None:
    check_batched_equals_alone(routed[0], prompts())
