"""Page-locked host buffers that go round: taken, filled by the device, read by others, taken again.

A buffer has one owner, whoever holds the memoryview; it returns when the last view of it goes, on
whatever thread. Pinning takes long, so a thread of its own pins ahead; who finds nothing ready
gets ordinary memory, which the device fills at a fifth of the speed, and is counted.
"""

import logging
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from daemon.errors import DeviceError
from daemon.kernels.runtime.device import Device

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SLAB_BYTES = 64 * 2**20
"""Pinned at a time, in as many whole buffers as it holds, or one."""

logger = logging.getLogger(__name__)


class _Shelf:
    """Free buffers of one size, of which `num_ready` are to be at hand."""

    def __init__(self, num_bytes: int, num_ready: int) -> None:
        self.num_bytes = num_bytes
        self.num_ready = num_ready
        self.free: deque[Bytes] = deque()


class PinnedPool:
    """Buffers of the sizes that were announced with `prepare`.

    Args:
        limit_bytes: the most that is ever pinned.

    Attributes:
        num_unpinned: how often no pinned buffer was ready.
    """

    def __init__(self, device: Device, limit_bytes: int) -> None:
        self.num_unpinned = 0
        self._device = device
        self._limit_bytes = limit_bytes
        self._shelves: dict[int, _Shelf] = {}
        self._slabs: list[Bytes] = []
        self._wanted = threading.Event()
        self._is_pinning = False

    def prepare(self, num_bytes: int, num_ready: int) -> None:
        """Have so many buffers of a size ready from now on."""
        self._shelves.setdefault(num_bytes, _Shelf(num_bytes, num_ready))
        self._wanted.set()
        if not self._is_pinning and self._device.computes:
            self._is_pinning = True
            arguments = (self._device, self._wanted, weakref.ref(self))
            weakref.finalize(self, self._wanted.set)
            threading.Thread(target=_pin_ahead, args=arguments, name="pinning", daemon=True).start()

    def take(self, num_bytes: int) -> memoryview:
        """A buffer of undefined content; any thread, never waits."""
        shelf = self._shelves.get(num_bytes)
        if shelf is None:
            return np.empty(num_bytes, np.uint8).data
        if len(shelf.free) <= shelf.num_ready // 2:
            self._wanted.set()
        try:
            buffer = shelf.free.pop()
        except IndexError:
            self.num_unpinned += 1
            logger.debug("no pinned buffer was ready, %d times so far", self.num_unpinned)
            return np.empty(num_bytes, np.uint8).data
        return np.asarray(_Lease(buffer, shelf)).data

    def owns(self, content: Bytes) -> bool:
        """Whether bytes lie in pinned memory of this pool, which the device reads by itself."""
        address = content.ctypes.data
        return any(0 <= address - slab.ctypes.data < slab.nbytes for slab in self._slabs)

    def fill_shelves(self) -> None:
        """Pin what is missing, as long as the limit allows; on the thread that pins."""
        for shelf in list(self._shelves.values()):
            while len(shelf.free) < shelf.num_ready and self._pin(shelf):
                pass

    def _pin(self, shelf: _Shelf) -> bool:
        count = max(1, SLAB_BYTES // shelf.num_bytes)
        pinned = sum(slab.nbytes for slab in self._slabs)
        if pinned + count * shelf.num_bytes > self._limit_bytes:
            return False
        slab = self._device.allocate_pinned(count * shelf.num_bytes)
        self._slabs.append(slab)
        shelf.free.extend(slab.reshape(count, shelf.num_bytes))
        return True


def _pin_ahead(device: Device, wanted: threading.Event, pool: "weakref.ref[PinnedPool]") -> None:
    """Until the pool is gone; it must not be kept by the thread that serves it."""
    try:
        device.use_here()
        while wanted.wait():
            wanted.clear()
            if (living := pool()) is None:
                return
            living.fill_shelves()
            del living
    except DeviceError as error:
        logger.warning("no more host memory is pinned, so checkpoints take longer: %s", error)


class _Lease:
    """Lends a buffer to NumPy, and puts it back when no view is left."""

    __slots__ = ("_buffer", "_shelf")

    def __init__(self, buffer: Bytes, shelf: _Shelf) -> None:
        self._buffer = buffer
        self._shelf = shelf

    @property
    def __array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self._buffer.__array_interface__
        return interface

    def __del__(self) -> None:
        self._shelf.free.append(self._buffer)
