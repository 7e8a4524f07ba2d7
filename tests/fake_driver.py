"""A CUDA driver without a card: memory is the host's, copies happen at once, launches are recorded.

Nothing is computed: what a kernel would write stays zero, so every sampled token is token 0. Any
call can be made to fail. Enumerations and structs are the real module's.
"""

import ctypes
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest

USERS = ("device", "driver", "kernel", "graph", "copy_lane")


class FakeDriver:
    """Stands in for `cuda.bindings.driver`.

    Attributes:
        errors: by function, the status that it returns instead of working.
        launched: names of kernels, with how often each was launched.
        free_bytes: device memory that is left.
    """

    def __init__(self, real: ModuleType, free_bytes: int = 2**31) -> None:
        self._real = real
        self._memory: dict[int, np.ndarray] = {}  # type: ignore[type-arg]
        self._names: dict[int, str] = {}
        self.version = 13_000
        self.num_devices = 1
        self.capability = (9, 0)
        self.free_bytes = free_bytes
        self.errors: dict[str, str] = {}
        self.launched: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name in (errors := object.__getattribute__(self, "errors")):
            status = self._status(errors[name])
            return lambda *_: (status, None)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu"):
            return lambda *_: (self._status(), None)
        return getattr(self._real, name)

    def _status(self, name: str = "CUDA_SUCCESS") -> Any:
        return getattr(self._real.CUresult, name)

    def cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return self._status(), status.name.lower().encode()

    def cuInit(self, flags: int) -> tuple[Any]:
        return (self._status(),)

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return self._status(), self.version

    def cuDeviceGetCount(self) -> tuple[Any, int]:
        return self._status(), self.num_devices

    def cuDeviceGetName(self, length: int, device: Any) -> tuple[Any, bytes]:
        return self._status(), b"Fake 9000\0\0"

    def cuDeviceGetAttribute(self, attribute: Any, device: Any) -> tuple[Any, int]:
        kinds = self._real.CUdevice_attribute
        values = {
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
            kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
            kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: 227 * 1024,
        }
        return self._status(), values[attribute]

    def cuDeviceTotalMem(self, device: Any) -> tuple[Any, int]:
        return self._status(), 24 * 2**30

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        return self._status(), self.free_bytes, 24 * 2**30

    def cuStreamCreate(self, flags: Any) -> tuple[Any, int]:
        return self._status(), 1

    def cuMemAlloc(self, num_bytes: int) -> tuple[Any, int]:
        if num_bytes > self.free_bytes:
            return self._status("CUDA_ERROR_OUT_OF_MEMORY"), 0
        self.free_bytes -= num_bytes
        return self._status(), self._take(num_bytes)

    def cuMemFree(self, pointer: int) -> tuple[Any]:
        self.free_bytes += len(self._memory.pop(pointer)) - 256
        return (self._status(),)

    def cuMemHostRegister(self, pointer: int, num_bytes: int, flags: int) -> tuple[Any]:
        return (self._status(),)

    def cuMemHostUnregister(self, pointer: int) -> tuple[Any]:
        return (self._status(),)

    def _take(self, num_bytes: int) -> int:
        memory = np.zeros(num_bytes + 256, np.uint8)
        pointer = -(-memory.ctypes.data // 256) * 256
        self._memory[pointer] = memory
        return pointer

    def cuMemcpyHtoDAsync(self, to: int, source: int, num_bytes: int, stream: Any) -> tuple[Any]:
        ctypes.memmove(to, source, num_bytes)
        return (self._status(),)

    cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = cuMemcpyHtoDAsync

    def cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[Any]:
        """From host to device only."""
        for row in range(copy.Height):
            to = int(copy.dstDevice) + row * copy.dstPitch
            self.cuMemcpyHtoDAsync(
                to, copy.srcHost + row * copy.srcPitch, copy.WidthInBytes, stream
            )
        return (self._status(),)

    def cuMemsetD8Async(self, pointer: int, byte: int, num_bytes: int, stream: Any) -> tuple[Any]:
        ctypes.memset(pointer, byte, num_bytes)
        return (self._status(),)

    def cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any, str]:
        return self._status(), name.decode()

    def cuLaunchKernelEx(self, config: Any, function: str, *_: Any) -> tuple[Any]:
        self.launched[function] += 1
        return (self._status(),)


def install_fake_driver(monkeypatch: pytest.MonkeyPatch, free_bytes: int = 2**31) -> FakeDriver:
    """Every part of the runtime calls the fake from now on."""
    from cuda.bindings import driver

    fake = FakeDriver(driver, free_bytes)
    install(fake, monkeypatch)
    return fake


def install(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a fake in the driver's place."""
    for user in USERS:
        monkeypatch.setattr(f"daemon.kernels.runtime.{user}.driver", fake)
