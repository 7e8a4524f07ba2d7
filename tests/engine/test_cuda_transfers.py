"""Snapshots move beside the device's steps, and nobody sees anything half-way: whatever runs first.

A driver with real streams does the copying; steps are played by work that checks and writes each
layer's bytes when the device comes to it. What they should find is known from the order of calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import install
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_driver import Recorded, StreamDriver

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.backend import Contents, Writing
from daemon.engine.backends.cuda_transfers import Kind, SnapshotTransfers, layer_parts
from daemon.engine.batch import Batch, Capture, Span
from daemon.errors import DeviceError
from daemon.kernels.delta_state import DeltaSizes, DeltaSlots
from daemon.kernels.kv_format import KvFormat, KvLayout
from daemon.kernels.runtime.copy_lane import CopyLane, runs
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import ElementType
from daemon.kernels.runtime.pinned_pool import PinnedPool

LAYERS: tuple[Kind, ...] = ("delta_net", "delta_net", "attention") * 7
SIZES = DeltaSizes(1, 1)
LAYOUT = KvLayout(7, 1, KvFormat.Q4_0, KvFormat.Q4_0)
NUM_SLOTS, NUM_PAGES = 5, 8

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class HandPinned(PinnedPool):
    """Pins when it is told to."""

    def __init__(self, device: Device) -> None:
        super().__init__(device, 2**28)
        self._is_pinning = True


class Card:
    """Slots and pages on a card that computes nothing, and what they should hold."""

    def __init__(self, driver: StreamDriver, num_pinned: int, seed: int) -> None:
        self.driver = driver
        self.rng = np.random.default_rng(seed)
        self.device = device = Device.open()
        num_deltas = LAYERS.count("delta_net")
        slot_bytes = DeltaSlots.slot_bytes(SIZES, num_deltas)
        memory = device.allocate((NUM_SLOTS, slot_bytes), ElementType.U8)
        self.slots = DeltaSlots(memory, SIZES, num_deltas, NUM_SLOTS)
        self.pages = device.allocate((NUM_PAGES, LAYOUT.page_bytes), ElementType.U8)
        self.buffers = HandPinned(device)
        if num_pinned:
            self.buffers.prepare(LAYOUT.page_bytes, num_pinned)
            self.buffers.prepare(slot_bytes, num_pinned)
            self.buffers.fill_shelves()
        self.lanes = CopyLane(device, "out"), CopyLane(device, "in")
        self.transfers = SnapshotTransfers(
            device, self.slots, self.pages, LAYOUT, LAYERS, self.buffers, self.lanes
        )
        self.slot_truth = [np.zeros(slot_bytes, np.uint8) for _ in range(NUM_SLOTS)]
        self.page_truth = [np.zeros(LAYOUT.page_bytes, np.uint8) for _ in range(NUM_PAGES)]
        self.problems: list[str] = []

    def snapshot(self, num_pages: int) -> tuple[memoryview, list[memoryview]]:
        """Random content, in buffers of the pool as long as there are any."""
        sizes = [len(self.slot_truth[0]), *[LAYOUT.page_bytes] * num_pages]
        buffers = [self.buffers.take(size) for size in sizes]
        for buffer in buffers:
            np.frombuffer(buffer, np.uint8)[:] = self.random(len(buffer))
        return buffers[0], buffers[1:]

    def random(self, size: int) -> Bytes:
        return self.rng.integers(0, 256, size, dtype=np.uint8)

    # ── what the engine calls ─────────────────────────────────────────────────────────────────

    def restore(self, slot: int, pages: list[int]) -> Writing:
        state, contents = self.snapshot(len(pages))
        writing = self.transfers.begin_write(slot, state, dict(zip(pages, contents, strict=True)))
        self.slot_truth[slot] = np.array(np.frombuffer(state, np.uint8))
        for page, content in zip(pages, contents, strict=True):
            self.page_truth[page] = np.array(np.frombuffer(content, np.uint8))
        return writing

    def save(self, slot: int, pages: list[int]) -> tuple[Any, bytes, list[bytes]]:
        expected = [self.page_truth[page].tobytes() for page in pages]
        reading = self.transfers.begin_read(slot, pages)
        return reading, self.slot_truth[slot].tobytes(), expected

    def clear(self, slot: int) -> None:
        self.transfers.before_writing([slot])
        self.slots.clear(self.device, slot)
        self.slot_truth[slot] = np.zeros_like(self.slot_truth[slot])

    def copy(self, source: int, target: int) -> None:
        self.transfers.before_reading(source)
        self.transfers.before_writing([target])
        self.slots.copy(self.device, source, target)
        self.slot_truth[target] = self.slot_truth[source].copy()

    def step(self, slot: int, pages: list[int], num_done: int, capture: int | None) -> None:
        """Evaluate the page behind the first `num_done`."""
        start = num_done * PAGE_TOKENS
        end = start + PAGE_TOKENS
        captures = () if capture is None else (Capture(end, capture),)
        tokens = np.zeros(PAGE_TOKENS, np.int32)
        batch = Batch("prefill", (Span(tokens, start, slot, tuple(pages), captures),))
        self.transfers.before_step(batch)
        num_seen: dict[Kind, int] = {"delta_net": 0, "attention": 0}
        for kind in LAYERS:
            self.transfers.before_layer(kind, num_seen[kind])
            if kind == "attention":
                self._attend(num_seen[kind], pages[:num_done], pages[num_done])
            else:
                self._recur(num_seen[kind], slot, capture)
            num_seen[kind] += 1
        self.transfers.after_step()

    # ── what the device does ──────────────────────────────────────────────────────────────────

    def _attend(self, layer: int, known: list[int], new: int) -> None:
        begin = LAYOUT.layer_offset(layer)
        place = slice(begin, begin + LAYOUT.layer_bytes)
        for page in known:
            expected = self.page_truth[page][place].copy()
            self._check(f"page {page} layer {layer}", self._page(page) + begin, expected)
        self.page_truth[new][place] = self.random(LAYOUT.layer_bytes)
        self._put(self._page(new) + begin, self.page_truth[new][place].copy())

    def _recur(self, layer: int, slot: int, capture: int | None) -> None:
        for begin, end in self.slots.layer_bytes(range(layer, layer + 1)):
            place = slice(begin, end)
            address = self.slots.slot(slot).pointer + begin
            expected = self.slot_truth[slot][place].copy()
            self._check(f"slot {slot} layer {layer}", address, expected)
            self.slot_truth[slot][place] = self.random(end - begin)
            self._put(address, self.slot_truth[slot][place].copy())
            if capture is not None:
                self.slot_truth[capture][place] = self.slot_truth[slot][place]
                target = self.slots.slot(capture).pointer + begin
                self._put(target, self.slot_truth[slot][place].copy())

    def _page(self, page: int) -> int:
        return self.pages.rows(page, page + 1).pointer

    def _check(self, what: str, address: int, expected: Bytes) -> None:
        def check() -> None:
            if ctypes.string_at(address, len(expected)) != expected.tobytes():
                self.problems.append(what)

        self.driver.enqueue(self.device.stream, check)

    def _put(self, address: int, content: Bytes) -> None:
        source = content.ctypes.data
        self.driver.enqueue(
            self.device.stream,
            lambda: ctypes.memmove(address, source, len(content)) and content,
        )


@contextmanager
def card(
    monkeypatch: pytest.MonkeyPatch, num_pinned: int = 16, seed: int = 0, prefer: str = "any"
) -> Iterator[Card]:
    from cuda.bindings import driver as real

    with monkeypatch.context() as patch:
        driver = StreamDriver(real, Random(seed))
        install(driver, patch)
        made = Card(driver, num_pinned, seed)
        if prefer != "any":
            streams = {made.device.stream} if prefer == "steps" else {2, 3}
            driver.preferred = streams
        with driver.running():
            yield made
            made.device.synchronize()
            for lane in made.lanes:
                lane._jobs.shutdown()
        assert made.problems == []


@pytest.mark.parametrize("prefer", ["steps", "copies", "any"])
@given(data=st.data(), seed=st.integers(0, 1000), num_pinned=st.sampled_from([0, 3, 16]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
def test_everyone_finds_what_was_there_in_the_order_of_calls(
    monkeypatch: pytest.MonkeyPatch, prefer: str, data: st.DataObject, seed: int, num_pinned: int
) -> None:
    with card(monkeypatch, num_pinned, seed, prefer) as made:
        saves = []
        for _ in range(data.draw(st.integers(1, 5))):
            slot, capture, other = data.draw(st.permutations(range(NUM_SLOTS)))[:3]
            pages = data.draw(st.permutations(range(NUM_PAGES)))[: data.draw(st.integers(2, 5))]
            num_done = len(pages) - 1
            if data.draw(st.booleans()):
                writing = made.restore(slot, pages[:num_done])
                if data.draw(st.booleans()):
                    # Cancelled: its places are somebody else's at once, and hold nothing.
                    writing.abandon()
                    made.clear(slot)
                    num_done = 0
            else:
                made.clear(slot)
                num_done = 0
            while num_done < len(pages) and data.draw(st.booleans()):
                capturing = data.draw(st.booleans())
                made.step(slot, pages, num_done, capture if capturing else None)
                num_done += 1
                if capturing:
                    saves.append(made.save(capture, pages[:num_done]))
                    made.copy(capture, other)
            saves.append(made.save(slot, pages[:num_done]))
        for reading, state, contents in saves:
            found: Contents = reading.result()
            assert bytes(found.state) == state
            assert [bytes(page) for page in found.pages] == contents


def test_a_step_begins_with_the_first_layers_while_the_last_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with card(monkeypatch, prefer="steps") as made:
        made.restore(0, [4]).arrived.result()
        gate, log = Recorded(), list[str]()
        copy = made.driver.cuMemcpyHtoDAsync
        first_page = made.pages.pointer

        def copy_and_say(to: int, source: int, num_bytes: int, stream: Any) -> Any:
            result = copy(to, source, num_bytes, stream)
            if first_page <= to < first_page + LAYOUT.page_bytes:
                layer = (to - first_page) // LAYOUT.layer_bytes
                made.driver.enqueue(stream, lambda: log.append(f"layer {layer} here"))
            return result

        monkeypatch.setattr(made.driver, "cuMemcpyHtoDAsync", copy_and_say)
        made.driver.enqueue(made.lanes[1]._stream, gate)
        made.restore(1, [0, 1, 2]).given.result()
        made.driver.enqueue(made.device.stream, lambda: log.append("step begins"))
        made.step(1, [0, 1, 2, 3], 3, None)
        made.driver.let_pass(gate)
        made.device.synchronize()
        assert log[0] == "step begins"
        starts = [part.attention.start for part in layer_parts(LAYERS)]
        assert log[1:] == [f"layer {start} here" for start in starts]


def test_saving_holds_up_neither_steps_nor_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    with card(monkeypatch) as made:
        made.save(0, [0])[0].result()
        gate = Recorded()
        made.driver.enqueue(made.lanes[0]._stream, gate)
        reading, *_ = made.save(0, [0, 1])
        made.restore(1, [2, 3]).arrived.result()
        made.step(1, [2, 3, 4], 2, None)
        made.device.synchronize()
        assert not reading.done()
        made.driver.let_pass(gate)
        reading.result()


def test_a_step_that_fails_leaves_nobody_before_its_restore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with card(monkeypatch, prefer="steps") as made:
        made.restore(1, [0, 1]).given.result()
        batch = Batch("prefill", (Span(np.zeros(1, np.int32), 128, 1, (0, 1, 2)),))
        made.transfers.before_step(batch)
        made.transfers.before_layer("delta_net", 0)
        made.transfers.after_step()
        made.step(2, [1, 0], 0, None)
        made.step(2, [1, 0], 1, None)


def test_a_restore_that_cannot_be_copied_says_so_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with card(monkeypatch) as made:
        made.driver.errors["cuMemcpyHtoDAsync"] = "CUDA_ERROR_INVALID_VALUE"
        writing = made.restore(1, [0, 1])
        with pytest.raises(DeviceError, match="copy to the GPU"):
            writing.given.result()
        del made.driver.errors["cuMemcpyHtoDAsync"]
        made.clear(1)
        made.step(1, [0, 1], 0, None)


def test_pages_side_by_side_are_copied_together() -> None:
    places = np.array([0, 10, 20, 40, 50, 70], np.int64)
    hosts = np.array([500, 510, 530, 540, 550, 560], np.int64)
    assert list(runs(places, hosts, 10)) == [(0, 500, 2), (20, 530, 1), (40, 540, 2), (70, 560, 1)]
    assert list(runs(places[:0], hosts[:0], 10)) == []


@pytest.mark.parametrize(
    ("num_groups", "tail", "sizes"),
    [
        (16, 0, [1, 3, 4, 3, 4, 1]),
        (10, 0, [1, 4, 4, 1]),
        (2, 1, [1, 1]),
        (1, 2, [1]),
        (3, 0, [1, 1, 1]),
    ],
)
def test_parts_have_every_layer_once_and_in_order(
    num_groups: int, tail: int, sizes: list[int]
) -> None:
    layers: tuple[Kind, ...] = ("delta_net", "delta_net", "delta_net", "attention") * num_groups
    layers += ("delta_net",) * tail
    parts = layer_parts(layers)
    assert [len(part.attention) for part in parts] == sizes
    assert [i for part in parts for i in part.attention] == list(range(num_groups))
    assert [i for part in parts for i in part.delta_net] == list(range(3 * num_groups + tail))
    assert all(len(part.delta_net) == 3 * len(part.attention) for part in parts[:-1])
