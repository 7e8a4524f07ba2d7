"""tiny-coder against its golden outputs, which a public implementation of the model computed."""

import json
from pathlib import Path

import numpy as np
import pytest

from daemon.cli import main
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.evaluation import evaluate
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.text.tokenizer import Tokenizer

VECTORS = Path(__file__).parents[1] / "vectors" / "tiny-coder"
MODEL = VECTORS / "tiny-coder-BF16.gguf"
BOUND = 2e-3
NUM_PROMPTS = 8

Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(VECTORS / "golden.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def model() -> Model:
    file = open_gguf(MODEL)
    return load_model(file, NumpyBackend(model_shape(file).rms_eps))


def assert_golden(logits: np.ndarray, golden: Golden, index: int) -> None:
    top_ids, top_logits = golden[f"{index}_top_ids"], golden[f"{index}_top_logits"]
    ours = np.take_along_axis(logits, top_ids, axis=1)
    np.testing.assert_allclose(ours, top_logits, rtol=0, atol=BOUND)
    np.testing.assert_allclose(logits[-1], golden[f"{index}_last_logits"], rtol=0, atol=BOUND)
    assert (logits.max(axis=1) <= top_logits[:, 0] + BOUND).all()


@pytest.mark.parametrize("index", range(NUM_PROMPTS))
def test_logits_of_every_position(model: Model, golden: Golden, index: int) -> None:
    assert_golden(evaluate(model, golden[f"{index}_ids"]), golden, index)


@pytest.mark.parametrize("index", range(NUM_PROMPTS))
def test_logits_along_the_greedy_reply(model: Model, golden: Golden, index: int) -> None:
    """Fed with the golden reply, every position prefers the golden next token."""
    ids, greedy = golden[f"{index}_ids"], golden[f"{index}_greedy"]
    logits = evaluate(model, np.concatenate([ids, greedy]))[len(ids) - 1 : -1]
    assert logits.argmax(axis=1).tolist() == greedy.tolist()


@pytest.mark.parametrize("index", [0, 3])
def test_the_logits_command(tmp_path: Path, golden: Golden, index: int) -> None:
    tokens, out = tmp_path / "ids.npy", tmp_path / "logits.npy"
    np.save(tokens, golden[f"{index}_ids"])
    assert main(["logits", "--model", str(MODEL), "--tokens", str(tokens), "--out", str(out)]) == 0
    logits = np.load(out)
    assert logits.dtype == np.float32
    assert logits.shape == (len(golden[f"{index}_ids"]), 8192)
    assert_golden(logits, golden, index)


@pytest.mark.parametrize(
    "tokens", [np.zeros(0, np.int32), np.zeros((2, 2), np.int32), np.asarray([8192]),
               np.asarray([-1]), np.asarray([0.5])],
)  # fmt: skip
def test_the_logits_command_refuses_what_is_no_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: np.ndarray
) -> None:
    path, out = tmp_path / "ids.npy", tmp_path / "logits.npy"
    np.save(path, tokens)
    assert main(["logits", "--model", str(MODEL), "--tokens", str(path), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("qwend: error: token ids must be")
    assert not out.exists()


@pytest.mark.parametrize("index", range(NUM_PROMPTS))
def test_token_ids(golden: Golden, index: int) -> None:
    tokenizer = Tokenizer.from_metadata(open_gguf(MODEL).metadata)
    texts = json.loads((VECTORS / "golden.json").read_text())[index]
    assert tokenizer.encode(texts["prompt"]) == golden[f"{index}_ids"].tolist()
    assert tokenizer.decode(golden[f"{index}_greedy"].tolist()) == texts["greedy"]
