"""A batch as the kernels read it: tokens, positions, page tables and places, on the device.

Owns the device arrays of one kind of batch. Those of decode keep their addresses, since recorded
graphs read them. Engine thread only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from daemon.engine.batch import Batch, Span
from daemon.kernels.attention_tiles import query_tiles
from daemon.kernels.delta_prefill import PrefillSpan, PrefillTables, chunk_tables
from daemon.kernels.quant_gemv import Plan
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray

Int32 = np.ndarray[Any, np.dtype[np.int32]]
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
    tiles: DeviceArray
    tables: PrefillTables
    last_rows: tuple[int, ...]


class DecodeTables:
    """The arrays of decode batches of up to `max_rows` sequences."""

    def __init__(self, device: Device, max_rows: int, max_pages: int) -> None:
        self._device = device
        self._max_pages = max_pages
        self._rows = device.allocate((4, max_rows), np.int32)
        self._page_table = device.allocate((max_rows, max_pages), np.int32)
        self._sequences = device.to_device(np.arange(max_rows, dtype=np.int32))

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
        table = page_table(spans, self._max_pages)
        self._device.write(self._rows, rows)
        self._device.write(self._page_table.rows(0, len(spans)), table)


class ProductOrder:
    """The matrices of a decode step in order, learnt as the first one runs.

    Each product can then bring its successor's weights nearer while it ends; the last one's
    successor is the first of the next step.
    """

    def __init__(self) -> None:
        self._plans: list[Plan] = []
        self._next = 0
        self._is_known = False

    def begin(self) -> None:
        """A step begins; if one has run before, all of its products are known."""
        self._is_known = self._is_known or self._next > 0
        self._next = 0

    def successor(self, plan: Plan) -> Plan | None:
        """What the step multiplies by after `plan`, the product that comes now."""
        self._next += 1
        if not self._is_known:
            self._plans.append(plan)
            return None
        assert self._plans[self._next - 1] is plan, "every step has the same products"
        return self._plans[self._next % len(self._plans)]


def prefill_run(device: Device, batch: Batch, max_pages: int) -> PrefillRun:
    """Upload what the kernels need to know of a prefill batch."""
    spans = batch.spans
    counts = [len(span.tokens) for span in spans]
    first_rows = np.cumsum([0, *counts])
    positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
    tiles = query_tiles(
        (int(row), span.start, count, index)
        for index, (row, span, count) in enumerate(zip(first_rows, spans, counts, strict=False))
    )
    chunks, lines = chunk_tables(
        [
            PrefillSpan(int(row), count, span.slot, _captures(span))
            for row, span, count in zip(first_rows, spans, counts, strict=False)
        ]
    )
    upload = device.to_device
    return PrefillRun(
        num_rows=int(first_rows[-1]),
        tokens=upload(np.concatenate([span.tokens for span in spans]).astype(np.int32)),
        positions=upload(positions.astype(np.int32)),
        sequences=upload(np.repeat(np.arange(len(spans), dtype=np.int32), counts)),
        page_table=upload(page_table(spans, max_pages)),
        tiles=upload(tiles),
        tables=PrefillTables(upload(chunks), upload(lines)),
        last_rows=tuple(
            int(end) - 1 for end, span in zip(first_rows[1:], spans, strict=True) if span.samples
        ),
    )


def page_table(spans: Sequence[Span], max_pages: int) -> Int32:
    """Page numbers `[spans, max_pages]`; what follows a span's own pages is never read."""
    table = np.zeros((len(spans), max_pages), np.int32)
    for line, span in zip(table, spans, strict=True):
        line[: len(span.pages)] = span.pages
    return table


def _captures(span: Span) -> tuple[tuple[int, int], ...]:
    return tuple((capture.position - span.start, capture.slot) for capture in span.captures)
