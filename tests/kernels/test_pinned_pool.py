"""Pinned buffers go round: one owner each, back when the last view goes, within the limit."""

import gc
import threading

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import FakeDriver

from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.pinned_pool import SLAB_BYTES, PinnedPool

SIZE = SLAB_BYTES // 4


class ByHand(PinnedPool):
    """Pins when the test says so instead of on a thread."""

    def __init__(self, device: Device, limit_bytes: int) -> None:
        super().__init__(device, limit_bytes)
        self._is_pinning = True


def is_pinned(pool: PinnedPool, buffer: memoryview) -> bool:
    return bool(pool.owns(np.array([address_of(buffer)]))[0])


def address_of(buffer: memoryview) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data


def test_a_buffer_comes_back_when_the_last_view_goes(fake_driver: FakeDriver) -> None:
    pool = ByHand(Device.open(), SLAB_BYTES)
    pool.prepare(SIZE, 4)
    pool.fill_shelves()
    taken = [pool.take(SIZE) for _ in range(4)]
    assert all(is_pinned(pool, buffer) for buffer in taken)
    addresses = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in taken}
    assert len(addresses) == 4
    view = np.frombuffer(taken[0], np.uint8)[5:]
    del taken[0]
    assert not is_pinned(pool, pool.take(SIZE))
    del view
    assert is_pinned(pool, pool.take(SIZE))
    assert pool.num_unpinned == 1


def test_never_more_is_pinned_than_allowed(fake_driver: FakeDriver) -> None:
    pool = ByHand(Device.open(), 2 * SLAB_BYTES)
    pool.prepare(SIZE, 100)
    pool.prepare(SIZE // 2, 100)
    for _ in range(3):
        pool.fill_shelves()
    taken = [pool.take(SIZE) for _ in range(10)]
    assert [is_pinned(pool, buffer) for buffer in taken] == [True] * 8 + [False] * 2
    assert not is_pinned(pool, pool.take(SIZE // 2))
    assert pool.pinned_bytes == 2 * SLAB_BYTES
    assert pool.num_unpinned == 3


def test_views_may_go_on_any_thread(fake_driver: FakeDriver) -> None:
    pool = ByHand(Device.open(), SLAB_BYTES)
    pool.prepare(SIZE, 4)
    pool.fill_shelves()
    for _ in range(20):
        holder = [pool.take(SIZE)]
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join()
    assert pool.num_unpinned == 0


def test_a_thread_pins_ahead_and_ends_with_the_pool(fake_driver: FakeDriver) -> None:
    pool = PinnedPool(Device.open(), SLAB_BYTES)
    pool.prepare(SIZE, 4)
    [thread] = [each for each in threading.enumerate() if each.name == "pinning"]
    while not pool._slabs:
        thread.join(0.001)
    assert is_pinned(pool, pool.take(SIZE))
    del pool
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
