"""A batch as the kernels read it: tokens, positions, page tables and places, on the device.

Owns the device arrays of one kind of batch. Those of decode keep their addresses, since recorded
graphs read them. Engine thread only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.batch import Batch, Span
from daemon.kernels.attention_tiles import MAX_ITEMS, TileDealer
from daemon.kernels.delta_prefill import PrefillSpan, PrefillTables, chunk_tables
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray

Int32 = np.ndarray[Any, np.dtype[np.int32]]
NUM_PARTS = 8
ALIGNED_INTS = 64
"""Of the arrays of a prefill batch: each begins on 256 bytes."""

NOWHERE = -1
"""Slot and position of padding rows, which kernels pass over."""


class DecodeRun(NamedTuple):
    """One token of each of `num_rows` sequences, padding included; arrays i32 `[num_rows]`."""

    num_rows: int
    tokens: DeviceArray
    positions: DeviceArray
    slots: DeviceArray
    captures: DeviceArray
    sequences: DeviceArray
    page_table: DeviceArray


class PrefillRun(NamedTuple):
    """Rows of several spans, one after the other; `last_rows` are those whose logits are wanted."""

    num_rows: int
    tokens: DeviceArray
    positions: DeviceArray
    sequences: DeviceArray
    page_table: DeviceArray
    items: DeviceArray
    merges: DeviceArray
    tables: PrefillTables
    last_rows: tuple[int, ...]


class DecodeTables:
    """The arrays of decode batches of up to `max_rows` sequences.

    A line of the page table goes up only when it changes: pages stay the same for many steps.
    """

    def __init__(self, device: Device, max_rows: int, max_pages: int) -> None:
        self._device = device
        self._rows = device.allocate((4, max_rows), np.int32)
        self._page_table = device.allocate((max_rows, max_pages), np.int32)
        self._sequences = device.to_device(np.arange(max_rows, dtype=np.int32))
        self._line = np.zeros((1, max_pages), np.int32)
        self._pages: list[tuple[int, ...] | None] = [None] * max_rows

    def run(self, num_rows: int) -> DecodeRun:
        """Views for a batch of `num_rows`, padding included."""
        tokens, positions, slots, captures = (
            self._rows.rows(i, i + 1).view((self._rows.shape[1],)).rows(0, num_rows)
            for i in range(4)
        )
        return DecodeRun(
            num_rows, tokens, positions, slots, captures,
            self._sequences.rows(0, num_rows), self._page_table.rows(0, num_rows),
        )  # fmt: skip

    def fill(self, spans: Sequence[Span]) -> None:
        """Write a batch; rows beyond its spans become padding."""
        rows = np.full(self._rows.shape, NOWHERE, np.int32)
        for i, span in enumerate(spans):
            rows[:3, i] = (span.tokens[0], span.start, span.slot)
        self._device.write(self._rows, rows)
        for i, span in enumerate(spans):
            if span.pages is not self._pages[i]:
                assert len(span.pages) <= self._line.shape[1]
                self._line[0, : len(span.pages)] = span.pages
                self._device.write(self._page_table.rows(i, i + 1), self._line)
                self._pages[i] = span.pages


class PrefillArrays:
    """The arrays of prefill batches: one stretch of memory, written by one copy a batch.

    The copy is from pinned memory and nothing waits for it, so that a batch is made ready while
    the one before still runs.
    """

    def __init__(
        self, device: Device, dealer: TileDealer, max_rows: int, max_spans: int, max_pages: int
    ) -> None:
        self._device = device
        self._dealer = dealer
        self._max_pages = max_pages
        max_chunks = max_rows // PAGE_TOKENS + max_spans
        sizes = (
            3 * max_rows, max_spans * max_pages, 20 * max_chunks, 8 * MAX_ITEMS, 4 * max_spans
        )  # fmt: skip
        size = sum(sizes) + NUM_PARTS * ALIGNED_INTS
        self._memory = device.allocate((size,), np.int32)
        self._pinned = device.allocate_pinned(2 * size * 4).view(np.int32).reshape(2, size)
        self._copied = [device.new_event() for _ in self._pinned]
        self._turn = 0

    def run(self, batch: Batch) -> PrefillRun:
        """Write a batch; its arrays are valid until the next."""
        spans = batch.spans
        counts = [len(span.tokens) for span in spans]
        first_rows = np.cumsum([0, *counts])
        placed = list(zip(first_rows.tolist(), spans, counts, strict=False))
        chunks, lines = chunk_tables(
            [PrefillSpan(row, count, span.slot, _captures(span)) for row, span, count in placed]
        )
        dealt = self._dealer.deal(
            (row, span.start, n, i) for i, (row, span, n) in enumerate(placed)
        )
        tokens, positions, sequences, table, items, merges, *tables = self._upload(
            np.concatenate([span.tokens for span in spans]),
            np.concatenate([np.arange(span.start, span.end) for span in spans]),
            np.repeat(np.arange(len(spans)), counts),
            page_table(spans, self._max_pages),
            *dealt,
            chunks,
            lines,
        )
        ends = zip(first_rows[1:].tolist(), spans, strict=True)
        return PrefillRun(
            int(first_rows[-1]), tokens, positions, sequences, table, items, merges,
            PrefillTables(*tables), tuple(end - 1 for end, span in ends if span.samples),
        )  # fmt: skip

    def _upload(self, *parts: np.ndarray[Any, np.dtype[Any]]) -> list[DeviceArray]:
        self._turn ^= 1
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        self._device.wait_for(copied)
        arrays, start = [], 0
        for part in parts:
            pinned[start : start + part.size] = part.reshape(-1)
            arrays.append(self._memory.view(part.shape, offset_bytes=start * 4))
            start += -(-part.size // ALIGNED_INTS) * ALIGNED_INTS
        self._device.write(self._memory.rows(0, start), pinned[:start])
        self._device.mark(copied)
        return arrays


def page_table(spans: Sequence[Span], max_pages: int) -> Int32:
    """Page numbers `[spans, max_pages]`; what follows a span's own pages is never read."""
    table = np.zeros((len(spans), max_pages), np.int32)
    for line, span in zip(table, spans, strict=True):
        assert len(span.pages) <= max_pages
        line[: len(span.pages)] = span.pages
    return table


def _captures(span: Span) -> tuple[tuple[int, int], ...]:
    return tuple((capture.position - span.start, capture.slot) for capture in span.captures)
