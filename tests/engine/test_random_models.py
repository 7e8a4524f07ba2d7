"""The random models are real in shape: counts of published files, sane logits, a working text."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import resized

from benchmarks.gguf_writer import num_bytes
from benchmarks.make_model import make_model, plan_tensors
from benchmarks.model_sizes import SIZES, TINY_DENSE, TINY_MOE, ModelSizes
from benchmarks.synthetic_vocabulary import REAL_SIZE, vocabulary_metadata
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.evaluation import evaluate
from daemon.engine.weights.digest import weights_digest
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("name", "mtp", "count"),
    [
        ("0.8b", False, 320),
        ("4b", False, 426),
        ("9b", False, 427),
        ("27b", False, 851),
        ("27b", True, 866),
        ("35b-a3b", False, 733),
    ],
)
def test_tensor_counts_of_published_files(name: str, mtp: bool, count: int) -> None:
    assert len(plan_tensors(resized(SIZES[name], mtp=mtp), "q4_k_m")) == count


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("0.8b", 0.7524), ("2b", 1.8818), ("4b", 4.2058), ("9b", 8.9538), ("27b", 26.8960),
     ("35b-a3b", 34.66), ("122b-a10b", 122.11), ("397b-a17b", 396.35)],
)  # fmt: skip
def test_parameter_counts(name: str, parameters: float) -> None:
    planned = plan_tensors(SIZES[name], "bf16")
    total = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in planned)
    assert total / 1e9 == pytest.approx(parameters, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "formats"),
    [("0.8b", {"F32": 133, "Q4_K": 152, "Q5_K": 18, "Q6_K": 17}),
     ("9b", {"F32": 177, "Q4_K": 204, "Q5_K": 24, "Q6_K": 22})],
)  # fmt: skip
def test_the_mix_of_published_q4_k_m_files(name: str, formats: dict[str, int]) -> None:
    planned = plan_tensors(SIZES[name], "q4_k_m")
    assert Counter(tensor.format.name for tensor in planned) == formats


def test_27b_is_as_large_as_the_real_file() -> None:
    assert sum(map(num_bytes, plan_tensors(SIZES["27b"], "q4_k_m"))) / 1e9 == pytest.approx(
        16.5, abs=0.3
    )


@pytest.mark.parametrize("sizes", [TINY_DENSE, TINY_MOE])
@pytest.mark.parametrize("mix", ["q4_k_m", "iq4_xs", "mxfp4_moe", "bf16"])
def test_a_model_speaks(tmp_path: Path, sizes: ModelSizes, mix: str) -> None:
    path = tmp_path / "m.gguf"
    written = make_model(path, resized(sizes, mtp=True), mix)
    assert written < path.stat().st_size
    file = open_gguf(path)
    tokenizer = Tokenizer.from_metadata(file.metadata)
    text = "hello there, Größe 漢字 🙂"
    ids = tokenizer.encode(text + "<|im_end|>")
    assert tokenizer.decode(ids) == text + "<|im_end|>"
    assert ids[-1] in tokenizer.stop_tokens
    logits = evaluate(
        load_model(file, NumpyBackend(model_shape(file).rms_eps)), np.asarray(ids, np.int32)
    )
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / name, resized(TINY_DENSE, layers=4), "q4_k_m", seed)
        digests.append(weights_digest(open_gguf(tmp_path / name)))
    assert digests[0] == digests[1] != digests[2]


def test_the_real_size_has_the_real_ids() -> None:
    metadata = vocabulary_metadata(REAL_SIZE)
    names = metadata["tokenizer.ggml.tokens"]
    assert len(names) == len(set(names)) == REAL_SIZE
    assert names[248_044] == "<|endoftext|>"
    assert names[248_068] == "<think>"
    assert metadata["tokenizer.ggml.eos_token_id"] == 248_046
    assert metadata["tokenizer.ggml.token_type"][248_077] == 5
