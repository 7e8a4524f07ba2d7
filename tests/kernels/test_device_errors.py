"""A GPU that is missing, too old, full or broken: one clear error each, never the CPU instead."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import USERS, FakeDriver

from daemon.errors import DeviceError, DeviceLost, NoDevice, OutOfDeviceMemory
from daemon.kernels.runtime import device as device_module
from daemon.kernels.runtime.device import Device


def test_no_driver_library(fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: int) -> None:
        raise RuntimeError("libcuda.so.1 cannot be found")

    monkeypatch.setattr(fake_driver, "cuInit", fail)
    with pytest.raises(NoDevice, match="no NVIDIA driver.*--device cpu"):
        Device.open()


@pytest.mark.parametrize("status", ["CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"])
def test_a_driver_that_does_not_start(fake_driver: FakeDriver, status: str) -> None:
    fake_driver.errors["cuInit"] = status
    with pytest.raises(NoDevice, match=status):
        Device.open()


def test_an_old_driver(fake_driver: FakeDriver) -> None:
    fake_driver.version = 12_040
    with pytest.raises(NoDevice, match=r"CUDA 12\.4; install 580"):
        Device.open()


def test_no_such_card(fake_driver: FakeDriver) -> None:
    fake_driver.num_devices = 0
    with pytest.raises(NoDevice, match="GPU 0"):
        Device.open()


def test_an_old_card(fake_driver: FakeDriver) -> None:
    fake_driver.capability = (7, 5)
    with pytest.raises(NoDevice, match="Fake 9000 is older"):
        Device.open()


def test_too_little_memory_says_how_much_was_asked(fake_driver: FakeDriver) -> None:
    device = Device.open()
    with pytest.raises(OutOfDeviceMemory, match="allocate 3072 MiB"):
        device.allocate((3, 2**30), np.uint8)


def test_memory_goes_back_to_the_driver(fake_driver: FakeDriver) -> None:
    device = Device.open()
    before = device.free_bytes()
    array = device.allocate((2**20,), np.float32)
    assert device.free_bytes() == before - 4 * 2**20
    del array
    assert device.free_bytes() == before


@pytest.mark.parametrize(
    "status",
    ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_ECC_UNCORRECTABLE"],
)
def test_what_takes_the_context_with_it_is_told_apart(fake_driver: FakeDriver, status: str) -> None:
    device = Device.open()
    fake_driver.errors["cuStreamSynchronize"] = status
    with pytest.raises(DeviceLost, match=status):
        device.synchronize()


def test_what_leaves_the_context_alone_is_an_ordinary_error(fake_driver: FakeDriver) -> None:
    device = Device.open()
    fake_driver.errors["cuStreamSynchronize"] = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(DeviceError) as caught:
        device.synchronize()
    assert not isinstance(caught.value, DeviceLost)


def test_the_fake_stands_in_for_every_user_of_the_driver() -> None:
    folder = Path(device_module.__file__).parent
    users = {path.stem for path in folder.glob("*.py") if "import driver\n" in path.read_text()}
    assert users == set(USERS)
