"""Bytes on their way from host memory to the device: read, copied and used at the same time.

Readers, on threads of their own, fill pinned buffers; a stream of its own copies them; the device's
stream waits for each copy and goes on with it. The device's thread sends; nothing sent may be
relied on before `finish`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.runtime.device import CopyStream, Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Fill = Callable[[Bytes], None]
Use = Callable[[DeviceArray], None]

NUM_BUFFERS = 8
NUM_READERS = min(NUM_BUFFERS, os.cpu_count() or 1)
BUFFER_BYTES = 16 * 2**20
"""Large enough for the copy engine, and in all less than a step's workspace, where copies land."""


class _Piece(NamedTuple):
    buffer: int
    num_bytes: int
    target: DeviceArray | None
    use: Use | None
    read: Future[None]


class _Buffers(NamedTuple):
    """What exists only while something is on its way."""

    pinned: Bytes
    copies: CopyStream
    readers: ThreadPoolExecutor


class Uploader:
    """Sends pieces of up to `buffer_bytes`, in order.

    Args:
        region: of the device's memory, where pieces land that a kernel reads on; nothing else may
            lie there meanwhile.
    """

    def __init__(self, device: Device, region: str = "", buffer_bytes: int = BUFFER_BYTES) -> None:
        self.buffer_bytes = buffer_bytes
        self._device = device
        self._region = region
        self._pieces: deque[_Piece] = deque()
        self._next = 0
        self._open: _Buffers | None = None
        self._landing: DeviceArray | None = None

    def send(self, num_bytes: int, fill: Fill, use: Use) -> None:
        """Have `fill` write a piece, then `use` launch what reads it on the device.

        Args:
            fill: gets the pinned piece; runs on a reader's thread.
            use: gets the piece on the device, u8 `[num_bytes]`; its launches go to the device's
                stream, behind the copy.
        """
        self._send(num_bytes, fill, None, use)

    def send_to(self, target: DeviceArray, fill: Fill) -> None:
        """Have `fill` write a piece, which goes to `target` as it is."""
        self._send(target.num_bytes, fill, target, None)

    def copy(self, source: Bytes, target: DeviceArray) -> None:
        """Copy bytes into an array, in as many pieces as it takes."""
        assert source.nbytes == target.num_bytes
        into = target.view((target.num_bytes,), ElementType.U8)
        for start in range(0, source.nbytes, self.buffer_bytes):
            part = source[start : start + self.buffer_bytes]
            self.send_to(into.rows(start, start + part.nbytes), partial(_write, part))

    def finish(self) -> None:
        """Wait until all has arrived and been used, and give the buffers back."""
        if self._open is None:
            return
        while self._pieces:
            self._start_copy(self._pieces.popleft())
        self._device.synchronize()
        self._open.readers.shutdown()
        self._open.copies.close()
        self._open = self._landing = None

    def _send(
        self, num_bytes: int, fill: Fill, target: DeviceArray | None, use: Use | None
    ) -> None:
        assert num_bytes <= self.buffer_bytes
        if target is None and self._landing is None:
            self._landing = self._make_landing()
        buffers = self._open = self._open or self._buffers()
        if not self._device.computes:
            return
        if len(self._pieces) == NUM_BUFFERS:
            self._start_copy(self._pieces.popleft())
        number = self._next % NUM_BUFFERS
        self._next += 1
        pinned = buffers.pinned[number, :num_bytes]
        read = buffers.readers.submit(self._read, buffers.copies, number, pinned, fill)
        self._pieces.append(_Piece(number, num_bytes, target, use, read))

    def _buffers(self) -> _Buffers:
        pinned = self._device.allocate_pinned(NUM_BUFFERS * self.buffer_bytes)
        return _Buffers(
            pinned.reshape(NUM_BUFFERS, self.buffer_bytes),
            self._device.copy_stream(NUM_BUFFERS),
            ThreadPoolExecutor(NUM_READERS, "upload", self._device.use_here),
        )

    def _make_landing(self) -> DeviceArray:
        self._device.clear(self._region)
        with self._device.region(self._region):
            return self._device.allocate((NUM_BUFFERS, self.buffer_bytes), np.uint8)

    @staticmethod
    def _read(copies: CopyStream, number: int, pinned: Bytes, fill: Fill) -> None:
        copies.wait_until_copied(number)
        fill(pinned)

    def _start_copy(self, piece: _Piece) -> None:
        assert self._open is not None
        piece.read.result()
        pinned, copies, _ = self._open
        on_device = piece.target
        if on_device is None:
            assert self._landing is not None
            place = self._landing.rows(piece.buffer, piece.buffer + 1)
            on_device = place.view((piece.num_bytes,))
        copies.copy(piece.buffer, on_device, pinned[piece.buffer, : piece.num_bytes])
        if piece.use is not None:
            piece.use(on_device)
        copies.mark_used(piece.buffer)


def _write(source: Bytes, pinned: Bytes) -> None:
    np.copyto(pinned, source)
