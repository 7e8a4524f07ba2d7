"""A GGUF file, or all parts of a split one: metadata and a table of tensors over mmap.

Owns the container format (little-endian GGUF versions 2 and 3). Does no arithmetic and knows no
architecture. Any thread may read; nothing changes after opening.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from daemon.engine.weights.quant_formats import QUANT_FORMATS, QuantFormat
from daemon.errors import ModelFileError, UnsupportedModel

U8 = np.dtype(np.uint8)
ARRAY_TYPE = 9
STRING_TYPE = 8
SCALAR_TYPES: Mapping[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
        6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
MAX_DIMENSIONS = 4
SPLIT_NAME = re.compile(r"^(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


class Tensor(Struct, frozen=True):
    """One tensor as it lies in the file.

    `shape` is in NumPy order (slowest first); `data` are its bytes, `[num_bytes]` uint8, a view
    into the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def num_elements(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.num_elements // self.format.block_elements * self.format.block_bytes


class GGUFFile(Struct, frozen=True):
    """An opened model file; a split one looks like one file.

    Strings are str, arrays of strings lists, other arrays NumPy arrays, the rest Python scalars.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of all parts together."""
        return sum(path.stat().st_size for path in self.paths)


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and, when its name says that it is split, all its other parts.

    Raises:
        ModelFileError: missing, truncated, not GGUF, inconsistent, or a part is absent.
        UnsupportedModel: a GGUF version or a tensor type that is not known.
    """
    paths = _split_paths(path)
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(paths):
        part_metadata, part_tensors = _read_part(part)
        if number == 0:
            metadata = part_metadata
        _check_split_number(part, part_metadata, number, len(paths))
        tensors.update(part_tensors)
    expected = _whole(path, metadata, "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileError(f"{path}: the parts hold {len(tensors)} tensors, not {expected}")
    return GGUFFile(tuple(paths), metadata, tensors)


def _split_paths(path: Path) -> list[Path]:
    match = SPLIT_NAME.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = (f"{match['prefix']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
    paths = [path.with_name(name) for name in names]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise ModelFileError(f"{path}: part of a split file is missing: {', '.join(missing)}")
    return paths


def _check_split_number(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    own_number = _whole(path, metadata, "split.no", number)
    own_count = _whole(path, metadata, "split.count", count) or 1
    if (own_number, own_count) != (number, count):
        raise ModelFileError(
            f"{path}: says it is part {own_number + 1} of {own_count}, "
            f"but its name says {number + 1} of {count}; open the first part under its own name"
        )


def _whole(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int:
        raise ModelFileError(f"{path}: metadata {key} is {value!r}, not an integer")
    return value


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    mapped = _map(path)
    cursor = _Cursor(path, mapped)
    try:
        version, num_tensors, num_entries = cursor.header()
        metadata = dict(cursor.entry(version) for _ in range(num_entries))
        infos = [cursor.tensor_info() for _ in range(num_tensors)]
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ModelFileError(f"{path}: truncated or damaged GGUF header") from error
    alignment = _whole(path, metadata, "general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(f"{path}: general.alignment is {alignment}, not a power of two")
    tensors = dict(_place_tensors(path, mapped, infos, cursor.position, alignment))
    if len(tensors) != len(infos):
        raise ModelFileError(f"{path}: holds {len(infos) - len(tensors)} tensor names twice")
    return metadata, tensors


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise ModelFileError(f"{path}: is empty, not a GGUF file") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error


def _place_tensors(
    path: Path,
    mapped: mmap.mmap,
    infos: list[tuple[str, tuple[int, ...], int, int]],
    header_end: int,
    alignment: int,
) -> Iterator[tuple[str, Tensor]]:
    content = np.frombuffer(mapped, dtype=U8)
    start = -(-header_end // alignment) * alignment
    for name, shape, type_id, offset in infos:
        format = QUANT_FORMATS.get(type_id)
        if format is None:
            raise UnsupportedModel(f"{path}: tensor {name} has the unknown type {type_id}")
        if not shape or shape[-1] % format.block_elements:
            raise ModelFileError(f"{path}: tensor {name} {shape} is not whole {format.name} blocks")
        if offset % alignment:
            raise ModelFileError(f"{path}: tensor {name} lies off the alignment of {alignment}")
        first = start + offset
        last = first + math.prod(shape) // format.block_elements * format.block_bytes
        if last > len(content):
            raise ModelFileError(
                f"{path}: truncated: tensor {name} ends at byte {last}, the file at {len(content)}"
            )
        yield name, Tensor(name, shape, format, content[first:last])


class _Cursor:
    """Reads the header from front to back; every length is checked against the file's end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped
        self.position = 0

    def header(self) -> tuple[int, int, int]:
        if self.mapped[:4] != b"GGUF":
            raise ModelFileError(f"{self.path}: is not a GGUF file")
        _, version, num_tensors, num_entries = self.unpack("<4sIQQ")
        if version not in (2, 3):
            hint = " (big-endian?)" if version > 0xFFFF else ""
            raise UnsupportedModel(f"{self.path}: GGUF version {version}{hint} is not supported")
        return version, num_tensors, num_entries

    def entry(self, version: int) -> tuple[str, Any]:
        key = self.string()
        (type_id,) = self.unpack("<I")
        return key, self.value(key, type_id)

    def value(self, key: str, type_id: int) -> Any:
        if type_id == STRING_TYPE:
            return self.string()
        if type_id != ARRAY_TYPE:
            return self.numbers(key, type_id, 1)[0].item()
        element_type, count = self.unpack("<IQ")
        if element_type == STRING_TYPE:
            return self.strings(count)
        return self.numbers(key, element_type, count)

    def numbers(self, key: str, type_id: int, count: int) -> np.ndarray[Any, Any]:
        dtype = SCALAR_TYPES.get(type_id)
        if dtype is None:
            raise ModelFileError(f"{self.path}: metadata {key} has the unknown type {type_id}")
        raw = self.take(dtype.itemsize * count)
        return np.frombuffer(raw, dtype=dtype)

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # A vocabulary has 250,000 entries and as many merges: this loop is most of opening a file.
        mapped, end, position = self.mapped, len(self.mapped), self.position
        unpack = struct.Struct("<Q").unpack_from
        if count > end // 8:
            raise ModelFileError(f"{self.path}: truncated or damaged GGUF header")
        strings = []
        for _ in range(count):
            first = position + 8
            position = first + unpack(mapped, position)[0]
            if position > end:
                raise ModelFileError(f"{self.path}: truncated or damaged GGUF header")
            strings.append(mapped[first:position].decode())
        self.position = position
        return strings

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (num_dimensions,) = self.unpack("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise ModelFileError(f"{self.path}: tensor {name} has {num_dimensions} dimensions")
        *extents, type_id, offset = self.unpack(f"<{num_dimensions}QIQ")
        return name, tuple(reversed(extents)), type_id, offset

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.mapped, self.position)
        self.position += struct.calcsize(layout)
        return values

    def take(self, num_bytes: int) -> bytes:
        first = self.position
        if first + num_bytes > len(self.mapped):
            raise ModelFileError(f"{self.path}: truncated or damaged GGUF header")
        self.position = first + num_bytes
        return self.mapped[first : self.position]
