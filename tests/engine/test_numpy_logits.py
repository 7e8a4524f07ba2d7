"""The NumPy backend against the architecture in float64, over files of many shapes and forms."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from builders import (
    SMALL_DENSE,
    SMALL_MOE,
    WHOLE_BLOCKS,
    Form,
    resized,
    write_model,
    write_split_model,
)
from float64_forward import Float64Forward, grouped

from benchmarks.model_sizes import ModelSizes
from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.batch import Batch, Span
from daemon.engine.evaluation import evaluate
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.engine.weights.quant_formats import DECODABLE

BOUND = 1e-4
LENGTHS = (1, 2, 3, 63, 64, 65, 130)
DECODED = 12

FILES: dict[str, tuple[ModelSizes, Form]] = {
    "one-value-head-a-key-head": (resized(SMALL_DENSE, v_heads=2, tied=True), Form()),
    "two-value-heads-a-key-head": (SMALL_DENSE, Form(recurrent_array=True)),
    "three-value-heads-a-key-head": (resized(SMALL_DENSE, v_heads=6, mtp=True), Form()),
    "four-value-heads-a-key-head": (resized(SMALL_DENSE, v_heads=8), Form(yarn=True)),
    "gqa-4": (resized(SMALL_DENSE, q_heads=8), Form(fused_qkv=True)),
    "gqa-6": (resized(SMALL_DENSE, q_heads=12, mtp=True), Form(head_arrays=True)),
    "gqa-16": (resized(SMALL_DENSE, q_heads=16, kv_heads=1), Form(fused_qkv=True, yarn=True)),
    "odd-sizes": (
        resized(
            SMALL_DENSE, hidden=52, dense_dim=76, head_dim=40, rope_dim=12, state_dim=24, vocab=101
        ),
        Form(),
    ),
    "real-heads": (
        resized(SMALL_DENSE, layers=8, head_dim=256, rope_dim=64, state_dim=128, conv_width=4),
        Form(recurrent_array=True, head_arrays=True),
    ),
    "every-second-layer": (resized(SMALL_DENSE, layers=2, interval=2, conv_width=3), Form()),
    "experts": (SMALL_MOE, Form(shared_router_row=True)),
    "experts-gqa-8": (
        resized(SMALL_MOE, q_heads=8, kv_heads=1, v_heads=6, mtp=True),
        Form(fused_gate_up=True, recurrent_array=True),
    ),
    "experts-none-shared": (resized(SMALL_MOE, shared_dim=0, experts_used=1, tied=True), Form()),
    "experts-all-used": (resized(SMALL_MOE, experts=4, experts_used=4), Form(fused_qkv=True)),
}


def load(path: Path) -> Model:
    file = open_gguf(path)
    return load_model(file, NumpyBackend(model_shape(file).rms_eps))


def some_tokens(count: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, vocab, count).astype(np.int32)


def decoded(model: Model, tokens: Sequence[int], num_prompt: int) -> np.ndarray:
    """Logits after the prompt and after each later token, fed one by one."""
    backend, pages = model.backend, tuple(range(-(-len(tokens) // PAGE_TOKENS)))
    backend.allocate(model.shape, num_slots=1, num_pages=len(pages))
    backend.clear_slot(0)
    first, *later = np.split(np.asarray(tokens, np.int32), range(num_prompt, len(tokens)))
    spans = [Span(first, 0, 0, pages, samples=True)]
    spans += [Span(token, num_prompt + i, 0, pages, samples=True) for i, token in enumerate(later)]
    batches = [Batch("decode" if i else "prefill", (span,)) for i, span in enumerate(spans)]
    return np.concatenate([backend.logits_to_host(model.logits(batch)) for batch in batches])


@pytest.mark.parametrize("name", FILES)
def test_logits_equal_float64(tmp_path: Path, name: str) -> None:
    sizes, form = FILES[name]
    path = write_model(tmp_path / "model.gguf", sizes, form=form)
    tokens = some_tokens(max(LENGTHS) + DECODED, sizes.vocab)
    expected = Float64Forward([path]).logits_of(tokens)
    assert 0.3 < expected.std() < 3
    model = load(path)
    for length in LENGTHS:
        logits = evaluate(model, tokens[:length])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[:length], rtol=0, atol=BOUND)
        logits = decoded(model, tokens[: length + DECODED], length)
        np.testing.assert_allclose(
            logits, expected[length - 1 : length + DECODED], rtol=0, atol=BOUND
        )


@pytest.mark.parametrize("format", sorted(DECODABLE))
@pytest.mark.parametrize("sizes", [WHOLE_BLOCKS, resized(SMALL_MOE, experts=3, hidden=256)])
def test_every_format(tmp_path: Path, format: str, sizes: ModelSizes) -> None:
    path = write_model(tmp_path / "model.gguf", sizes, mix=format)
    formats = {tensor.format.name for tensor in open_gguf(path).tensors.values()}
    assert format in formats
    tokens = some_tokens(20, sizes.vocab)
    expected = Float64Forward([path]).logits_of(tokens)
    np.testing.assert_allclose(evaluate(load(path), tokens), expected, rtol=0, atol=BOUND)


def test_mixed_formats_and_split_files(tmp_path: Path) -> None:
    path = write_model(tmp_path / "mixed.gguf", WHOLE_BLOCKS, mix="q4_k_m", form=Form(yarn=True))
    tokens = some_tokens(70, WHOLE_BLOCKS.vocab)
    expected = Float64Forward([path]).logits_of(tokens)
    np.testing.assert_allclose(evaluate(load(path), tokens), expected, rtol=0, atol=BOUND)
    paths = write_split_model(tmp_path / "split.gguf", SMALL_MOE, num_parts=4)
    expected = Float64Forward(paths).logits_of(tokens)
    np.testing.assert_allclose(evaluate(load(paths[0]), tokens), expected, rtol=0, atol=BOUND)


def test_a_wrong_key_head_is_noticed(tmp_path: Path) -> None:
    """Negative control: value heads grouped by key head, as the original checkpoints have them."""
    path = write_model(tmp_path / "model.gguf", SMALL_DENSE)
    tokens = some_tokens(40, SMALL_DENSE.vocab)
    wrong = Float64Forward([path], grouped).logits_of(tokens)
    assert np.abs(evaluate(load(path), tokens) - wrong).max() > 0.5


def test_a_missing_rotation_is_noticed(tmp_path: Path) -> None:
    """Negative control: the same weights with other frequencies give other logits."""
    plain = write_model(tmp_path / "plain.gguf", SMALL_DENSE)
    scaled = write_model(tmp_path / "yarn.gguf", SMALL_DENSE, form=Form(yarn=True))
    tokens = some_tokens(130, SMALL_DENSE.vocab)
    assert np.abs(evaluate(load(plain), tokens) - evaluate(load(scaled), tokens)).max() > 0.01
