"""Decode batches as the kernels read them, over a device that only remembers what was written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from daemon.engine.backends.cuda_run import DecodeTables
from daemon.engine.batch import Span
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

MAX_ROWS, MAX_PAGES = 4, 6


class Memory:
    """Int32 words by address."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.num_writes = 0
        self._next = 256

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        array = DeviceArray(self._next, shape, ElementType.of(np.dtype(dtype)), None)
        self._next += array.num_bytes + 256
        return array

    def to_device(self, values: np.ndarray[Any, Any]) -> DeviceArray:
        array = self.allocate(values.shape, values.dtype)
        self.write(array, values)
        return array

    def write(self, target: DeviceArray, values: np.ndarray[Any, Any]) -> None:
        assert target.num_bytes == values.nbytes
        self.num_writes += 1
        for i, value in enumerate(values.reshape(-1).tolist()):
            self.words[target.pointer + 4 * i] = value

    def read(self, array: DeviceArray, count: int) -> list[int]:
        return [self.words[array.pointer + 4 * i] for i in range(count)]


def span(token: int, start: int, slot: int, pages: tuple[int, ...]) -> Span:
    return Span(np.array([token], np.int32), start, slot, pages, samples=True)


def test_rows_without_a_sequence_are_padding() -> None:
    memory = Memory()
    tables = DecodeTables(memory, MAX_ROWS, MAX_PAGES)  # type: ignore[arg-type]
    tables.fill([span(11, 70, 2, (5, 6)), span(12, 3, 0, (1,))])
    run = tables.run(4)
    assert memory.read(run.tokens, 4) == [11, 12, -1, -1]
    assert memory.read(run.positions, 4) == [70, 3, -1, -1]
    assert memory.read(run.slots, 4) == [2, 0, -1, -1]
    assert memory.read(run.captures, 4) == [-1] * 4
    assert memory.read(run.sequences, 4) == [0, 1, 2, 3]


def test_a_line_of_pages_goes_up_when_it_changes() -> None:
    memory = Memory()
    tables = DecodeTables(memory, MAX_ROWS, MAX_PAGES)  # type: ignore[arg-type]
    first, second, longer = (5, 6, 7), (1, 2), (1, 2, 9)

    def lines(*pages: tuple[int, ...]) -> list[list[int]]:
        """Fill, and read back as many pages of each line as the sequence has."""
        tables.fill([span(1, 64, i, own) for i, own in enumerate(pages)])
        table = tables.run(len(pages)).page_table
        return [memory.read(table.rows(i, i + 1), len(own)) for i, own in enumerate(pages)]

    assert lines(first, second) == [[5, 6, 7], [1, 2]]
    before = memory.num_writes
    assert lines(first, second) == [[5, 6, 7], [1, 2]]
    assert memory.num_writes == before + 1
    assert lines(first, longer) == [[5, 6, 7], [1, 2, 9]]
    assert lines(longer) == [[1, 2, 9]]
    assert lines(first, longer) == [[5, 6, 7], [1, 2, 9]]
