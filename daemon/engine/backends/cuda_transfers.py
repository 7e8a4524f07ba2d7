"""Snapshots on their way between device and host, beside the stream of steps: who waits for whom.

Owns what is under way. Copies run on two lanes, one a direction, so that steps, saves and restores
go on at the same time; whatever touches a place that a copy reads or writes waits for that copy,
on the device. A restore comes layer by layer, and a prompt's step waits before each layer only for
that layer. The engine's thread calls; jobs run on the lanes' threads.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import accumulate, pairwise, repeat
from typing import Any, Literal, NamedTuple

import numpy as np

from daemon.checkpoint import PAGE_TOKENS, HostBytes
from daemon.engine.backends.backend import Contents, Writing
from daemon.engine.batch import Batch
from daemon.kernels.delta_state import DeltaSlots
from daemon.kernels.kv_format import KvLayout
from daemon.kernels.runtime.copy_lane import Addresses, CopyLane, Mark, Rows, runs
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.pinned_pool import PinnedPool

Kind = Literal["delta_net", "attention"]
MAX_PART_LAYERS = 4
"""Attention layers of one part of a restore."""


class Part(NamedTuple):
    """Layers that are restored together: those of each kind, `[first, end)`."""

    delta_net: range
    attention: range


def layer_parts(layers: Sequence[Kind]) -> tuple[Part, ...]:
    """Parts of a model, in the order of its layers; a part ends behind an attention layer.

    The first and the last have one attention layer: a step begins with the first, and when the last
    has arrived only its layers remain to be computed. Those between are large, since each part of
    each run of pages is a copy of its own.
    """
    num_attention = layers.count("attention")
    num_inner = max(0, num_attention - 2)
    num_parts = -(-num_inner // MAX_PART_LAYERS)
    cuts = {0, max(0, num_attention - 1), num_attention}
    cuts |= {1 + num_inner * i // num_parts for i in range(num_parts)}
    deltas = [0, *(_deltas_until(layers, cut) for cut in sorted(cuts)[1:])]
    deltas[-1] = layers.count("delta_net")
    return tuple(
        Part(range(*delta_net), range(*attention))
        for delta_net, attention in zip(pairwise(deltas), pairwise(sorted(cuts)), strict=True)
    )


def _deltas_until(layers: Sequence[Kind], num_attention: int) -> int:
    """Delta-net layers before so many attention layers are through."""
    through = list(accumulate(int(kind == "attention") for kind in layers)).index(num_attention)
    return layers[:through].count("delta_net")


class Transfer:
    """One snapshot under way: it comes after `began` in the device's stream, and its parts pass
    the marks `arrived`, which are set once `given` has resolved."""

    def __init__(self, device: Device, slot: int, pages: Collection[int], num_parts: int) -> None:
        self.slot = slot
        self.pages = frozenset(pages)
        self.began = Mark()
        self.arrived = [Mark() for _ in range(num_parts)]
        self.given: Future[None] = Future()
        self.done: Future[Any] = Future()
        device.mark(self.began.event)

    def touches(self, slots: Collection[int], pages: Collection[int]) -> bool:
        """Whether it reads or writes one of these places."""
        return self.slot in slots or not self.pages.isdisjoint(pages)


class LayerWait:
    """Has the device's stream wait for a restore's parts as a step comes to them."""

    def __init__(self, device: Device, parts: Sequence[Part], transfer: Transfer) -> None:
        self._device = device
        self._parts = parts
        self._marks = transfer.arrived
        self._num_awaited = 0

    def before(self, kind: Kind, layer: int) -> None:
        """The next launch uses a layer's state, or its keys and values."""
        while (
            self._num_awaited < len(self._parts)
            and layer >= getattr(self._parts[self._num_awaited], kind).start
        ):
            self._await_next()

    def finish(self) -> None:
        """What the step has not come to."""
        while self._num_awaited < len(self._parts):
            self._await_next()

    def _await_next(self) -> None:
        self._device.follow(self._marks[self._num_awaited].event)
        self._num_awaited += 1


class SnapshotTransfers:
    """See the module's docstring.

    Args:
        pages: u8 `[num_pages, page_bytes]`.
        layers: of the model, in order.
        lanes: outward and inward.
    """

    def __init__(
        self,
        device: Device,
        slots: DeltaSlots,
        pages: DeviceArray,
        layout: KvLayout,
        layers: Sequence[Kind],
        buffers: PinnedPool,
        lanes: tuple[CopyLane, CopyLane],
    ) -> None:
        self._device = device
        self._slots = slots
        self._pages = pages
        self._layout = layout
        self._parts = layer_parts(layers)
        self._buffers = buffers
        self._outward, self._inward = lanes
        self._reads: list[Transfer] = []
        self._writes: list[Transfer] = []
        self._waits: list[LayerWait] = []

    # ── on the engine's thread ────────────────────────────────────────────────────────────────

    def begin_read(self, slot: int, pages: Sequence[int]) -> Future[Contents]:
        """See `Backend.begin_read`."""
        self._forget_done()
        before = [write for write in self._writes if write.touches([slot], pages)]
        transfer = Transfer(self._device, slot, pages, num_parts=1)
        self._reads.append(transfer)
        reading = self._outward.submit(self._read, transfer, tuple(pages), before)
        transfer.done = reading
        return reading

    def begin_write(self, slot: int, state: HostBytes, pages: Mapping[int, HostBytes]) -> Writing:
        """See `Backend.begin_write`."""
        self._forget_done()
        before = [read for read in self._reads if read.touches([slot], pages)]
        transfer = Transfer(self._device, slot, pages, len(self._parts))
        self._writes.append(transfer)
        writing = Writing()
        writing.arrived = transfer.done = self._inward.submit(
            self._write, transfer, writing, state, pages, before
        )
        return writing

    def before_reading(self, slot: int) -> None:
        """The device's stream is about to read a slot."""
        self._await([write for write in self._writes if write.touches([slot], ())])

    def before_writing(self, slots: Collection[int], pages: Collection[int] = ()) -> None:
        """The device's stream is about to write slots and pages."""
        under_way = self._reads + self._writes
        self._await([transfer for transfer in under_way if transfer.touches(slots, pages)])

    def before_step(self, batch: Batch) -> None:
        """The device's stream is about to evaluate a batch; of restores into the sequences of a
        prompt it waits for each layer when the step comes to it, see `before_layer`."""
        if not self._reads and not self._writes:
            return
        self._forget_done()
        if batch.kind == "prefill":
            slots = {span.slot for span in batch.spans}
            for write in [write for write in self._writes if write.slot in slots]:
                write.given.result()
                self._writes.remove(write)
                self._waits.append(LayerWait(self._device, self._parts, write))
        slots = {span.slot for span in batch.spans}
        slots |= {capture.slot for span in batch.spans for capture in span.captures}
        pages = {
            page
            for span in batch.spans
            for page in span.pages[span.start // PAGE_TOKENS : -(-span.end // PAGE_TOKENS)]
        }
        self.before_writing(slots, pages)

    def before_layer(self, kind: Kind, layer: int) -> None:
        """The step comes to the `layer`-th layer of its kind."""
        for wait in self._waits:
            wait.before(kind, layer)

    def after_step(self) -> None:
        """Whatever the step did, the device's stream is now behind its restores."""
        for wait in self._waits:
            wait.finish()
        self._waits.clear()

    def _await(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            transfer.given.result()
            self._device.follow(transfer.arrived[-1].event)
            # Behind it now, the device's stream need not wait a second time.
            under_way = self._reads if transfer in self._reads else self._writes
            under_way.remove(transfer)

    def _forget_done(self) -> None:
        self._reads = [transfer for transfer in self._reads if not transfer.done.done()]
        self._writes = [transfer for transfer in self._writes if not transfer.done.done()]

    # ── on the lanes' threads ─────────────────────────────────────────────────────────────────

    def _read(self, transfer: Transfer, pages: tuple[int, ...], before: list[Transfer]) -> Contents:
        lane, size = self._outward, self._layout.page_bytes
        slot = self._slots.slot(transfer.slot)
        sizes = [slot.num_bytes, *(size for _ in pages)]
        buffers: list[HostBytes] = [self._buffers.take(num_bytes) for num_bytes in sizes]
        hosts = _addresses(buffers)
        try:
            with _giving(lane, transfer, before):
                lane.read(slot.pointer, int(hosts[0]), slot.num_bytes)
                for place, host, count in runs(self._places(pages), hosts[1:], size):
                    lane.read(place, host, count * size)
        finally:
            lane.wait_for(transfer.arrived[-1])
        return Contents(buffers[0], buffers[1:])

    def _write(
        self,
        transfer: Transfer,
        writing: Writing,
        state: HostBytes,
        pages: Mapping[int, HostBytes],
        before: list[Transfer],
    ) -> None:
        lane = self._inward
        try:
            copies = self._copies(pages)
            with _giving(lane, transfer, before):
                for part, mark in zip(self._parts, transfer.arrived, strict=True):
                    if writing.is_abandoned:
                        break
                    for rows in self._rows(part, transfer.slot, state, copies):
                        lane.write(rows)
                    lane.set(mark)
        except BaseException as error:
            writing.given.set_exception(error)
            raise
        else:
            writing.given.set_result(None)
        finally:
            # Buffers and places are in use until then.
            lane.wait_for(transfer.arrived[-1])

    def _copies(self, pages: Mapping[int, HostBytes]) -> list[tuple[int, int, int]]:
        """Runs of pages, see `runs`. What is not pinned is copied by itself."""
        order = sorted(pages)
        places, hosts = self._places(order), _addresses(pages[page] for page in order)
        is_pinned = self._buffers.owns(hosts)
        alone = zip(places[~is_pinned].tolist(), hosts[~is_pinned].tolist(), repeat(1))
        return [*runs(places[is_pinned], hosts[is_pinned], self._layout.page_bytes), *alone]

    def _rows(
        self, part: Part, slot: int, state: HostBytes, copies: Sequence[tuple[int, int, int]]
    ) -> Iterator[Rows]:
        """What a part consists of: its layers of the state, and of each run of pages."""
        place, [source] = self._slots.slot(slot).pointer, _addresses([state]).tolist()
        for start, end in self._slots.layer_bytes(part.delta_net):
            yield Rows(place + start, source + start, end - start, end - start, 1)
        layout, first = self._layout, part.attention.start
        start, width = layout.layer_offset(first), layout.layer_bytes * len(part.attention)
        for place, host, count in copies:
            yield Rows(place + start, host + start, width, layout.page_bytes, count)

    def _places(self, pages: Sequence[int]) -> Addresses:
        return self._pages.pointer + np.array(pages, np.int64) * self._layout.page_bytes


@contextmanager
def _giving(lane: CopyLane, transfer: Transfer, before: Sequence[Transfer]) -> Iterator[None]:
    """Give a lane a transfer's copies, behind those before it and what the device was doing.

    Whatever happens meanwhile, the last mark is set and `given` resolves: others wait for both.
    """
    try:
        for other in before:
            other.given.result()
            lane.follow(other.arrived[-1])
        lane.follow(transfer.began)
        yield
    finally:
        try:
            lane.set(transfer.arrived[-1])
        finally:
            transfer.given.set_result(None)


def _addresses(contents: Iterable[HostBytes]) -> Addresses:
    arrays = (np.frombuffer(content, np.uint8) for content in contents)
    return np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)
