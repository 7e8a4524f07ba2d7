"""From tensor names to weights: what is missing, misshapen or unreadable is named."""

from pathlib import Path

import msgspec
import pytest
from builders import SMALL_DENSE, SMALL_MOE, model_metadata, resized, tensors, write_model
from gguf import GGMLQuantizationType

from benchmarks.gguf_writer import StoredTensor, write_gguf
from benchmarks.model_sizes import ModelSizes
from benchmarks.random_tensors import RandomTensor
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model
from daemon.errors import TensorError, UnsupportedModel

DENSE, MOE = (resized(sizes, layers=2, interval=2) for sizes in (SMALL_DENSE, SMALL_MOE))
NAMES = [(sizes, tensor.name) for sizes in (DENSE, MOE) for tensor in tensors(sizes)]
OPTIONAL = "output.weight"


def load(path: Path, sizes: ModelSizes, planned: list[StoredTensor]) -> Model:
    write_gguf(path, model_metadata(sizes), planned)
    return load_model(open_gguf(path), NumpyBackend(1e-6))


@pytest.mark.parametrize(("sizes", "name"), NAMES)
def test_a_missing_tensor_is_named(tmp_path: Path, sizes: ModelSizes, name: str) -> None:
    rest = [tensor for tensor in tensors(sizes) if tensor.name != name]
    if name == OPTIONAL:
        load(tmp_path / "m.gguf", sizes, rest)
    else:
        with pytest.raises(TensorError, match=f"{name} is missing"):
            load(tmp_path / "m.gguf", sizes, rest)


@pytest.mark.parametrize(("sizes", "name"), NAMES)
def test_a_wrong_shape_is_named(tmp_path: Path, sizes: ModelSizes, name: str) -> None:
    """One row too many. The embedding's rows are the vocabulary's size, so its columns change."""
    planned = tensors(sizes)
    index = [tensor.name for tensor in planned].index(name)
    shape = list(planned[index].shape)
    shape[1 if name == "token_embd.weight" else 0] += 1
    planned[index] = RandomTensor(
        name=name, shape=tuple(shape), format=GGMLQuantizationType.F32, std=1.0
    )
    with pytest.raises(TensorError, match=f"{name} has shape .* expected"):
        load(tmp_path / "m.gguf", sizes, planned)


def test_a_format_that_is_not_supported_is_named(tmp_path: Path) -> None:
    """IQ1_S: known to the container, not to the engine. Only its size matters here."""
    sizes = resized(DENSE, hidden=256)
    odd = GGMLQuantizationType.IQ1_S

    class Blocks(msgspec.Struct, frozen=True):
        name: str
        shape: tuple[int, ...]
        format: GGMLQuantizationType = odd
        num_pieces: int = 1

        def piece(self, index: int) -> bytes:
            return bytes(self.shape[0] * self.shape[1] // 256 * 50)

    name = "blk.0.ffn_gate.weight"
    planned = [Blocks(t.name, t.shape) if t.name == name else t for t in tensors(sizes)]
    with pytest.raises(UnsupportedModel, match=f"{name} has the format IQ1_S"):
        load(tmp_path / "m.gguf", sizes, planned)  # type: ignore[arg-type]


def test_more_tensors_than_needed_are_left_alone(tmp_path: Path) -> None:
    more = RandomTensor(
        name="blk.0.attn_qkv.scale", shape=(1,), format=GGMLQuantizationType.F32, std=1.0
    )
    assert load(tmp_path / "m.gguf", DENSE, [*tensors(DENSE), more]).shape.hidden == DENSE.hidden


def test_the_prediction_block_is_no_layer(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", resized(DENSE, mtp=True))
    model = load_model(open_gguf(path), NumpyBackend(1e-6))
    assert len(model.weights.layers) == DENSE.layers


def test_no_embedding(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match=r"token_embd.weight is missing"):
        load(tmp_path / "m.gguf", DENSE, [])
