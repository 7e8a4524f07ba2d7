"""Uploads on a driver without a card: every byte arrives in order, and errors are not lost."""

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import FakeDriver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.upload import Bytes, Uploader


@given(sizes=st.lists(st.integers(1, 5000), max_size=12), seed=st.integers(0, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_bytes_arrive(fake_driver: FakeDriver, sizes: list[int], seed: int) -> None:
    device = Device.open()
    uploader = Uploader(device, buffer_bytes=1024)
    rng = np.random.default_rng(seed)
    sources = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    targets = [device.allocate((size,), np.uint8) for size in sizes]
    for source, target in zip(sources, targets, strict=True):
        uploader.copy(source, target)
    uploader.finish()
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(device.to_host(target), source)


def test_pieces_are_used_in_the_order_in_which_they_were_sent(fake_driver: FakeDriver) -> None:
    device = Device.open()
    uploader = Uploader(device, buffer_bytes=64)
    seen: list[int] = []

    def send(number: int) -> None:
        def fill(piece: Bytes) -> None:
            piece[:] = number

        def use(piece: DeviceArray) -> None:
            seen.append(int(device.to_host(piece)[0]))

        uploader.send(32, fill, use)

    for number in range(20):
        send(number)
    uploader.finish()
    assert seen == list(range(20))


def test_what_a_reader_raises_comes_out(fake_driver: FakeDriver) -> None:
    uploader = Uploader(Device.open(), buffer_bytes=64)

    def fail(piece: Bytes) -> None:
        raise OSError("the disk is gone")

    uploader.send(1, fail, lambda piece: None)
    with pytest.raises(OSError, match="the disk is gone"):
        uploader.finish()


def test_buffers_go_back_and_can_be_had_again(fake_driver: FakeDriver) -> None:
    device = Device.open()
    before = device.free_bytes()
    uploader = Uploader(device, buffer_bytes=2**20)
    target = device.allocate((16,), np.uint8)
    for _ in range(2):
        uploader.send(16, lambda piece: piece.fill(1), lambda piece: device.copy(target, piece))
        assert device.free_bytes() < before - 2**20
        uploader.finish()
        assert device.free_bytes() > before - 2**20
    np.testing.assert_array_equal(device.to_host(target), 1)
