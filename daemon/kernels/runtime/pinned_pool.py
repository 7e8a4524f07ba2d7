"""Page-locked host buffers that go round: taken, filled by the device, read by others, taken again.

A buffer has one owner, whoever holds the memoryview; it returns when the last view of it goes, on
whatever thread. Pinning takes long, so a thread of its own pins ahead; who finds nothing ready
gets ordinary memory, which the device fills at a fifth of the speed, and is counted. The lowest
address goes out first, so that buffers taken one after the other lie side by side and are copied
together.
"""

import heapq
import logging
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from daemon.errors import DeviceError
from daemon.kernels.runtime.device import Device

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SLAB_BYTES = 32 * 2**20
"""Pinned at a time, in as many whole buffers as it holds, or one."""

GAP_BYTES = 256
"""Pinned behind the buffers of a slab: no copy may run on into the next slab."""

logger = logging.getLogger(__name__)


class _Shelf:
    """Free buffers of one size, by address, of which `num_ready` are to be at hand.

    What comes back waits in `returned`, since that may happen anywhere, with the lock held too.
    """

    def __init__(self, num_bytes: int, num_ready: int) -> None:
        self.num_bytes = num_bytes
        self.num_ready = num_ready
        self.returned: deque[int] = deque()
        self._free: list[int] = []
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Buffers at hand."""
        return len(self._free) + len(self.returned)

    def take(self) -> int | None:
        """The address of a free buffer, or None."""
        with self._lock:
            while self.returned:
                heapq.heappush(self._free, self.returned.popleft())
            return heapq.heappop(self._free) if self._free else None


class PinnedPool:
    """Buffers of the sizes that were announced with `prepare`.

    Args:
        limit_bytes: the most that is ever pinned.

    Attributes:
        num_unpinned: how often no pinned buffer was ready.
    """

    def __init__(self, device: Device, limit_bytes: int) -> None:
        self.num_unpinned = 0
        self.limit_bytes = limit_bytes
        self._device = device
        self._shelves: dict[int, _Shelf] = {}
        self._slabs: list[Bytes] = []
        self._wanted = threading.Event()
        self._is_pinning = False

    @property
    def pinned_bytes(self) -> int:
        """Of all buffers, at hand or lent."""
        return sum(slab.nbytes - GAP_BYTES for slab in list(self._slabs))

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
        if shelf.num_free <= shelf.num_ready // 2:
            self._wanted.set()
        address = shelf.take()
        if address is None:
            self.num_unpinned += 1
            logger.debug("no pinned buffer was ready, %d times so far", self.num_unpinned)
            return np.empty(num_bytes, np.uint8).data
        return np.asarray(_Lease(address, shelf, self)).data

    def num_free(self, num_bytes: int) -> int:
        """How many buffers of a size are at hand."""
        return self._shelves[num_bytes].num_free

    def owns(self, addresses: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        """Which addresses lie in pinned memory, that the device reads by itself: bools, alike."""
        slabs = sorted((slab.ctypes.data, slab.nbytes) for slab in list(self._slabs))
        if not slabs:
            return np.zeros(addresses.shape, bool)
        starts, sizes = np.array(slabs, np.int64).T
        nearest = np.maximum(np.searchsorted(starts, addresses, "right") - 1, 0)
        offsets = addresses - starts[nearest]
        return (offsets >= 0) & (offsets < sizes[nearest])

    def fill_shelves(self) -> None:
        """Pin what is missing, as long as the limit allows; on the thread that pins."""
        for shelf in list(self._shelves.values()):
            while shelf.num_free < shelf.num_ready and self._pin(shelf):
                pass

    def _pin(self, shelf: _Shelf) -> bool:
        count = max(1, SLAB_BYTES // shelf.num_bytes)
        if self.pinned_bytes + count * shelf.num_bytes > self.limit_bytes:
            return False
        slab = self._device.allocate_pinned(count * shelf.num_bytes + GAP_BYTES)
        self._slabs.append(slab)
        first = slab.ctypes.data
        shelf.returned.extend(range(first, first + count * shelf.num_bytes, shelf.num_bytes))
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
    """Lends a buffer to NumPy, and puts it back when no view is left. Keeps the pool's memory."""

    __slots__ = ("_address", "_pool", "_shelf")

    def __init__(self, address: int, shelf: _Shelf, pool: PinnedPool) -> None:
        self._address = address
        self._shelf = shelf
        self._pool = pool

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self._shelf.num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
        }

    def __del__(self) -> None:
        self._shelf.returned.append(self._address)
