"""Arrays in device memory: a pointer, a shape, an element type, and who keeps the memory alive.

Owns the layout of an array (always row-major and contiguous); refuses to know how memory is
allocated or copied, which is `device.py`'s. Any thread; contents belong to the stream that writes.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


class ElementType(Enum):
    """What an array's elements are: (name in CUDA's terms, the NumPy type that carries the bits).

    NumPy has neither bfloat16 nor fp8, so those travel as unsigned integers of the same width.
    """

    F32 = ("float", np.dtype(np.float32))
    F16 = ("half", np.dtype(np.float16))
    BF16 = ("bfloat16", np.dtype(np.uint16))
    FP8_E4M3 = ("fp8", np.dtype(np.uint8))
    I64 = ("int64", np.dtype(np.int64))
    U64 = ("uint64", np.dtype(np.uint64))
    I32 = ("int32", np.dtype(np.int32))
    U32 = ("uint32", np.dtype(np.uint32))
    I16 = ("int16", np.dtype(np.int16))
    U16 = ("uint16", np.dtype(np.uint16))
    I8 = ("int8", np.dtype(np.int8))
    U8 = ("uint8", np.dtype(np.uint8))

    @property
    def carrier(self) -> np.dtype[Any]:
        """The NumPy type of the same width that holds the bits on the host."""
        carrier: np.dtype[Any] = self.value[1]
        return carrier

    @property
    def num_bytes(self) -> int:
        """Width of one element."""
        return int(self.carrier.itemsize)

    @staticmethod
    def of(dtype: ElementType | DTypeLike) -> ElementType:
        """The element type that a NumPy type names; bf16 and fp8 must be given as themselves."""
        if isinstance(dtype, ElementType):
            return dtype
        return _BY_DTYPE[np.dtype(dtype)]


_NAMED_BY_NUMPY = [e for e in ElementType if e not in (ElementType.BF16, ElementType.FP8_E4M3)]
_BY_DTYPE = {element.carrier: element for element in _NAMED_BY_NUMPY}


class DeviceArray:
    """A contiguous array in device memory; a view keeps its owner's memory alive.

    Attributes:
        pointer: device address of the first element.
        shape: extents, slowest first.
        dtype: the element type.
    """

    __slots__ = ("_owner", "dtype", "pointer", "shape")

    def __init__(
        self, pointer: int, shape: tuple[int, ...], dtype: ElementType, owner: object
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype
        self._owner = owner

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.num_bytes

    def view(
        self,
        shape: tuple[int, ...],
        dtype: ElementType | DTypeLike | None = None,
        offset_bytes: int = 0,
    ) -> DeviceArray:
        """Part of this array's memory under another shape and type, from `offset_bytes` on."""
        element = self.dtype if dtype is None else ElementType.of(dtype)
        part = DeviceArray(self.pointer + offset_bytes, shape, element, self._owner)
        assert 0 <= offset_bytes
        assert offset_bytes + part.num_bytes <= self.num_bytes
        assert part.pointer % element.num_bytes == 0
        return part

    def rows(self, start: int, stop: int) -> DeviceArray:
        """The sub-array `[start:stop]` of the first axis."""
        assert 0 <= start <= stop <= self.shape[0]
        row_bytes = math.prod(self.shape[1:]) * self.dtype.num_bytes
        return self.view((stop - start, *self.shape[1:]), offset_bytes=start * row_bytes)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype.name}{list(self.shape)} at {self.pointer:#x})"
