"""The container: every metadata type, split files, and no damage that is not named as such."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import SMALL_DENSE, resized, tensors, write_model, write_split_model
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.gguf_writer import encode_value, write_gguf
from benchmarks.random_tensors import GivenTensor, RandomTensor
from benchmarks.synthetic_vocabulary import REAL_SIZE, vocabulary_metadata
from daemon.engine.weights.digest import weights_digest
from daemon.engine.weights.gguf import open_gguf
from daemon.errors import ModelError, ModelFileError, UnsupportedModel

SCALARS: dict[str, Any] = {
    "u8": np.uint8(255),
    "i8": np.int8(-128),
    "u16": np.uint16(65_535),
    "i16": np.int16(-32_768),
    "u32": np.uint32(2**32 - 1),
    "i32": np.int32(-(2**31)),
    "f32": np.float32(0.1),
    "bool": np.True_,
    "u64": np.uint64(2**64 - 1),
    "i64": np.int64(-(2**63)),
    "f64": np.float64(0.1),
}
SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)


def vector(name: str, count: int) -> GivenTensor:
    return GivenTensor(name=name, values=np.arange(count, dtype=np.float32))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    metadata = {
        "general.architecture": "qwen35",
        "general.alignment": 64,
        "names": ["", "a", "ß", "漢字"],
        "flags": [True, False],
        "numbers": [1, -2],
        "share": 0.5,
    }
    q8 = RandomTensor(name="m", shape=(3, 64), format=GGMLQuantizationType.Q8_0, std=1.0)
    write_gguf(path, metadata, [vector("v", 5), q8])
    return path.read_bytes()


# ── what is in a file ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SCALARS)
def test_every_scalar_type(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "m.gguf", {"key": SCALARS[name]}, [])
    value = open_gguf(tmp_path / "m.gguf").metadata["key"]
    assert value == SCALARS[name].item()
    assert type(value) is type(SCALARS[name].item())


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_array_type(tmp_path: Path, name: str, count: int) -> None:
    values = np.repeat(SCALARS[name], count)
    write_gguf(tmp_path / "m.gguf", {"key": values, "after": "it"}, [])
    metadata = open_gguf(tmp_path / "m.gguf").metadata
    assert metadata["key"].dtype == values.dtype
    np.testing.assert_array_equal(metadata["key"], values)
    assert metadata["after"] == "it"


@SETTINGS
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
)
def test_any_text(tmp_path: Path, text: str, texts: list[str]) -> None:
    write_gguf(tmp_path / "m.gguf", {"one": text, "many": texts}, [])
    assert open_gguf(tmp_path / "m.gguf").metadata == {"one": text, "many": texts}


@pytest.mark.parametrize("alignment", [None, 1, 8, 32, 4096])
def test_tensors_lie_on_the_alignment(tmp_path: Path, alignment: int | None) -> None:
    metadata = {} if alignment is None else {"general.alignment": alignment}
    planned = [vector("a", 3), vector("b", 1), vector("c", 9)]
    write_gguf(tmp_path / "m.gguf", metadata, planned)
    file = open_gguf(tmp_path / "m.gguf")
    for tensor in planned:
        found = file.tensors[tensor.name]
        assert found.shape == tensor.shape
        assert found.data.tobytes() == tensor.values.tobytes()


def test_agrees_with_another_reader(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", SMALL_DENSE, mix="q8_0")
    file, other = open_gguf(path), GGUFReader(path)
    names = {key for key in other.fields if not key.startswith("GGUF.")}
    assert set(file.metadata) == names
    for key in names:
        np.testing.assert_array_equal(file.metadata[key], other.fields[key].contents())
    assert len(file.tensors) == len(other.tensors)
    for tensor in other.tensors:
        ours = file.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.format.name == tensor.tensor_type.name
        assert ours.data.tobytes() == tensor.data.tobytes()
        assert ours.num_elements == tensor.n_elements
    assert file.num_bytes == path.stat().st_size


def test_version_2_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"key": 1}, [vector("a", 3)], version=2)
    assert open_gguf(tmp_path / "m.gguf").metadata == {"key": 1}


def test_the_real_vocabulary_is_read_whole(tmp_path: Path) -> None:
    metadata = vocabulary_metadata(REAL_SIZE)
    write_gguf(tmp_path / "m.gguf", metadata, [])
    found = open_gguf(tmp_path / "m.gguf").metadata
    assert found["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.merges"] == metadata["tokenizer.ggml.merges"]
    assert found["tokenizer.ggml.tokens"][248_046] == "<|im_end|>"


# ── split files ───────────────────────────────────────────────────────────────────────────────


def test_a_split_file_looks_like_one(tmp_path: Path) -> None:
    whole = open_gguf(write_model(tmp_path / "whole.gguf", SMALL_DENSE))
    split = open_gguf(write_split_model(tmp_path / "part.gguf", SMALL_DENSE, num_parts=3)[0])
    assert len(split.paths) == 3
    assert list(split.tensors) == list(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert split.tensors[name].data.tobytes() == tensor.data.tobytes()
    assert weights_digest(split) == weights_digest(whole)
    assert split.num_bytes == sum(path.stat().st_size for path in split.paths)


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    one = open_gguf(write_model(tmp_path / "one.gguf", SMALL_DENSE))
    other = open_gguf(write_model(tmp_path / "other.gguf", SMALL_DENSE, extra={"more": 1}))
    changed = open_gguf(write_model(tmp_path / "changed.gguf", SMALL_DENSE, seed=1))
    assert weights_digest(one) == weights_digest(other)
    assert weights_digest(one) != weights_digest(changed)


def test_any_part_of_a_split_opens_all_of_it(tmp_path: Path) -> None:
    paths = write_split_model(tmp_path / "part.gguf", SMALL_DENSE, num_parts=3)
    assert open_gguf(paths[2]).paths == tuple(paths)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_split_model(tmp_path / "part.gguf", SMALL_DENSE, num_parts=3)
    paths[1].unlink()
    with pytest.raises(ModelFileError, match=paths[1].name):
        open_gguf(paths[0])


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    paths = write_split_model(tmp_path / "part.gguf", SMALL_DENSE, num_parts=3)
    first, second = paths[0].read_bytes(), paths[1].read_bytes()
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(ModelFileError, match="part 2 of 3"):
        open_gguf(paths[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    paths = write_split_model(tmp_path / "part.gguf", SMALL_DENSE, num_parts=3)
    alone = paths[1].rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelFileError, match="under its own name"):
        open_gguf(alone)


def test_a_wrong_total_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"split.tensors.count": np.int32(2)}, [vector("a", 3)])
    with pytest.raises(ModelFileError, match="1 tensors, not 2"):
        open_gguf(tmp_path / "m.gguf")


# ── what is no model file ─────────────────────────────────────────────────────────────────────


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for name in ("missing.gguf", "empty.gguf", "."):
        with pytest.raises(ModelFileError) as caught:
            open_gguf(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"G", b"GGUF", b"GGU\0" * 20, b"PK\3\4" * 100, bytes(4096)])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelFileError):
        open_gguf(tmp_path / "m.gguf")


def test_big_endian_and_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(struct.pack(">4sIQQ", b"GGUF", 3, 0, 0))
    with pytest.raises(UnsupportedModel, match="big-endian"):
        open_gguf(path)
    for version in (0, 1, 4):
        path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, 0))
        with pytest.raises(UnsupportedModel, match=f"version {version}"):
            open_gguf(path)


@pytest.mark.parametrize("alignment", [0, 3, 48, -32, True, "32", 32.5, [32]])
def test_bad_alignment(tmp_path: Path, alignment: Any) -> None:
    content = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    content += struct.pack("<Q", 17) + b"general.alignment" + encode_value(alignment)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match="alignment"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
@pytest.mark.parametrize("value", ["two", [1, 2], -1])
def test_bad_split_keys(tmp_path: Path, key: str, value: Any) -> None:
    write_gguf(tmp_path / "m.gguf", {key: value}, [vector("a", 3)])
    with pytest.raises(ModelFileError):
        open_gguf(tmp_path / "m.gguf")


def with_info(extents: tuple[int, ...], type_id: int, offset: int) -> bytes:
    """A file of one tensor that says this of itself, and 64 bytes of data."""
    info = struct.pack("<Q", 1) + b"t" + struct.pack("<I", len(extents))
    info += struct.pack(f"<{len(extents)}Q", *extents) + struct.pack("<IQ", type_id, offset)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + info
    return header + bytes(-len(header) % 32 + 64)


@pytest.mark.parametrize(
    ("extents", "type_id", "offset"),
    [
        ((17,), 0, 0),
        ((16,), 0, 32),
        ((16,), 0, 2**63),
        ((16,), 0, 2**64 - 32),
        ((2**63,), 0, 0),
        ((2**32, 2**32), 0, 0),
        ((2**32, 2**32, 2**32, 2**32), 0, 0),
        ((2**64 - 1,), 24, 0),
        ((33,), 8, 0),
        ((16, 0), 8, 0),
        ((), 0, 0),
        ((1,) * 5, 0, 0),
        ((16,), 0, 3),
    ],
)
def test_tensors_that_cannot_be(
    tmp_path: Path, extents: tuple[int, ...], type_id: int, offset: int
) -> None:
    (tmp_path / "m.gguf").write_bytes(with_info(extents, type_id, offset))
    with pytest.raises(ModelFileError, match="tensor t|damaged"):
        open_gguf(tmp_path / "m.gguf")


def test_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(with_info((16,), 4711, 0))
    with pytest.raises(UnsupportedModel, match="4711"):
        open_gguf(tmp_path / "m.gguf")


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, [vector("a", 3), vector("a", 3)])
    with pytest.raises(ModelFileError, match="twice"):
        open_gguf(tmp_path / "m.gguf")


def test_every_truncation_is_noticed(tmp_path: Path, small_file: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in range(len(small_file)):
        path.write_bytes(small_file[:length])
        with pytest.raises(ModelFileError):
            open_gguf(path)


@SETTINGS
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_harmless(
    tmp_path: Path, small_file: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(small_file)
    places = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        damaged[place] = value
    (tmp_path / "m.gguf").write_bytes(damaged)
    try:
        file = open_gguf(tmp_path / "m.gguf")
    except ModelError:
        return
    for tensor in file.tensors.values():
        blocks = tensor.num_elements // tensor.format.block_elements
        assert len(tensor.data) == blocks * tensor.format.block_bytes


@SETTINGS
@given(content=st.binary(max_size=300))
def test_noise_after_the_magic(tmp_path: Path, content: bytes) -> None:
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1)
    (tmp_path / "m.gguf").write_bytes(header + content)
    with pytest.raises(ModelError):
        open_gguf(tmp_path / "m.gguf")


def test_truncated_model_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", resized(SMALL_DENSE, tied=True))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ModelFileError, match=f"truncated: tensor {tensors(SMALL_DENSE)[-2].name}"):
        open_gguf(path)
