"""Files that mix formats, as published ones do: pairs of two, and some that no kernel has."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import FakeDriver
from gguf import GGMLQuantizationType as Format
from msgspec.structs import replace
from test_planned_memory import planned_backend

from benchmarks.gguf_writer import write_gguf
from benchmarks.make_model import architecture_metadata, plan_tensors
from benchmarks.model_sizes import TINY_DENSE
from daemon.engine.backends.cuda_memory import CudaLimits
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.evaluation import evaluate
from daemon.engine.weights.gguf import GGUFFile, open_gguf
from daemon.engine.weights.loader import load_model, model_shape

SIZES = replace(TINY_DENSE, vocab=1024)
FORMATS = {
    "blk.0.ffn_up.weight": Format.Q6_K,
    "blk.1.ffn_gate.weight": Format.IQ4_XS,
    "blk.2.ffn_up.weight": Format.Q5_0,
    "blk.2.ffn_down.weight": Format.Q3_K,
    "blk.1.attn_qkv.weight": Format.IQ4_NL,
    "blk.3.attn_q.weight": Format.Q2_K,
    "blk.3.attn_v.weight": Format.BF16,
    "token_embd.weight": Format.Q5_0,
}


@pytest.fixture
def mixed_file(tmp_path: Path) -> GGUFFile:
    tensors = [
        replace(tensor, format=FORMATS[tensor.name]) if tensor.name in FORMATS else tensor
        for tensor in plan_tensors(SIZES, "q4_k_m")
    ]
    write_gguf(tmp_path / "mixed.gguf", architecture_metadata(SIZES, "mixed"), tensors)
    return open_gguf(tmp_path / "mixed.gguf")


def test_pairs_of_two_formats_are_stacked_and_planned_for(
    fake_driver: FakeDriver, mixed_file: GGUFFile, caplog: pytest.LogCaptureFixture
) -> None:
    device, plan, backend = planned_backend(mixed_file)
    model = load_model(mixed_file, backend)
    backend.allocate(model.shape, 6, plan.num_pages)
    pairs = [layer.feed_forward.gate_up for layer in model.weights.layers]
    assert [pair.is_paired for pair in pairs] == [False, False, False, True]
    assert device.used_bytes_of("weights") == plan.needs.weights_bytes
    # Once per format, however many tensors have it, and nothing while it was only planned.
    assert sorted(caplog.messages) == [
        "weights in IQ4_NL are kept, value for value, as Q8_0 (tensors: 1)",
        "weights in Q2_K are rounded to Q8_0 (tensors: 1)",
        "weights in Q3_K are rounded to Q8_0 (tensors: 1)",
        "weights in Q5_0 are kept, value for value, as Q8_0 (tensors: 2)",
    ]


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_reference(mixed_file: GGUFFile) -> None:
    from daemon.engine.backends.cuda_backend import CudaBackend
    from daemon.kernels.runtime.compiler import Compiler
    from daemon.kernels.runtime.device import Device

    device = Device.open()
    eps = model_shape(mixed_file).rms_eps
    cuda = CudaBackend(device, Compiler(device.arch, None), CudaLimits(context_length=512), eps)
    tokens = np.random.default_rng(3).integers(0, SIZES.vocab, 200).astype(np.int32)
    expected = evaluate(load_model(mixed_file, NumpyBackend(eps)), tokens)
    got = evaluate(load_model(mixed_file, cuda), tokens)
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
