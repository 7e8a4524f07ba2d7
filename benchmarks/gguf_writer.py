"""Writes GGUF files, tensor data in pieces, so that a file may be larger than memory.

Owns the container format, little-endian version 3. Draws no numbers and knows no model.
"""

import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
NUMPY_TYPES = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5,
    "float32": 6, "bool": 7, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip


class StoredTensor(Protocol):
    """What can be written: `shape` in NumPy order, slowest first."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> GGMLQuantizationType: ...

    @property
    def num_pieces(self) -> int: ...

    def piece(self, index: int) -> np.ndarray:
        """A part of the tensor's bytes; several threads may make different ones."""
        ...


def num_bytes(tensor: StoredTensor) -> int:
    """Size of a tensor's data; its rows must be whole blocks."""
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor.format]
    assert tensor.shape[-1] % block_elements == 0, (tensor.name, tensor.shape, tensor.format)
    return int(np.prod(tensor.shape, dtype=np.int64)) // block_elements * block_bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[StoredTensor],
    version: int = 3,
    has_data: bool = True,
) -> None:
    """Write one file; without data, a hole of its size follows the header.

    A value's type follows from Python's: str, bool, int (u32, i32 when negative), float (f32), or
    a sequence of one of them (of int: i32). A NumPy scalar or array states its own type.
    """
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + encode_value(value))
        _write_infos(file, tensors, alignment)
        if not has_data:
            _pad(file, alignment)
            spaces = (-(-num_bytes(tensor) // alignment) * alignment for tensor in tensors)
            file.truncate(file.tell() + sum(spaces))
            return
        for is_first, piece in _made_ahead(tensors):
            if is_first:
                _pad(file, alignment)
            file.write(memoryview(piece).cast("B"))


def write_split(
    first: Path, metadata: Mapping[str, Any], parts: Sequence[Sequence[StoredTensor]]
) -> list[Path]:
    """Write `<stem>-00001-of-0000N.gguf` and so on beside `first`; their paths, in order."""
    total = sum(map(len, parts))
    paths = []
    for number, tensors in enumerate(parts):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(len(parts)),
            "split.tensors.count": np.int32(total),
        }
        path = first.with_name(f"{first.stem}-{number + 1:05d}-of-{len(parts):05d}.gguf")
        write_gguf(path, {**metadata, **split} if number == 0 else split, tensors)
        paths.append(path)
    return paths


def encode_value(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, Sequence) and value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    array = _typed(value)
    code = NUMPY_TYPES[array.dtype.name]
    if array.ndim:
        return struct.pack("<IIQ", ARRAY, code, len(array)) + array.tobytes()
    return struct.pack("<I", code) + array.tobytes()


def _made_ahead(tensors: Iterable[StoredTensor]) -> Iterator[tuple[bool, np.ndarray]]:
    """All pieces in order, and whether each begins a tensor; a few are made in advance."""
    num_threads = len(os.sched_getaffinity(0))
    pending: deque[tuple[bool, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for tensor in tensors:
            for index in range(tensor.num_pieces):
                pending.append((index == 0, threads.submit(tensor.piece, index)))
                if len(pending) > 2 * num_threads:
                    is_first, made = pending.popleft()
                    yield is_first, made.result()
        for is_first, made in pending:
            yield is_first, made.result()


def _typed(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if isinstance(value, Sequence):
        sample = value[0] if value else 0
        is_whole = isinstance(sample, int) and not isinstance(sample, bool)
        return np.asarray(value, np.int32 if is_whole else type(_typed(sample).item()))
    if isinstance(value, bool):
        return np.asarray(value)
    if isinstance(value, int):
        return np.asarray(value, np.int32 if value < 0 else np.uint32)
    return np.asarray(value, np.float32)


def _write_infos(file: BinaryIO, tensors: Iterable[StoredTensor], alignment: int) -> None:
    offset = 0
    for tensor in tensors:
        extents = tuple(reversed(tensor.shape))
        layout = f"<I{len(extents)}QIQ"
        info = struct.pack(layout, len(extents), *extents, int(tensor.format), offset)
        file.write(_string(tensor.name) + info)
        offset += -(-num_bytes(tensor) // alignment) * alignment


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
