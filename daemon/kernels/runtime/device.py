"""One CUDA device: its context, its stream, its memory, copies and timing.

Owns the primary context and one stream, in whose order everything here runs; refuses to know what
the bytes mean. One thread at a time: the one that opened the device, or called `use_here`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import DTypeLike

from daemon.errors import NoDevice
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.driver import checked
from daemon.kernels.runtime.reservation import Region, aligned, cut_regions

OLDEST_DRIVER = 13000
"""As cuDriverGetVersion writes 13.0: cubins of a 13.x compiler load from there on."""

OLDEST_CARD = (8, 0)
"""Compute capability of the first cards with bf16 tensor cores and asynchronous copies."""

_ATTRIBUTE = driver.CUdevice_attribute


class DeviceMemory:
    """An allocation; freed when the last array over it goes."""

    __slots__ = ("_free", "num_bytes", "pointer")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        allocated = driver.cuMemAlloc(max(num_bytes, 1))
        self.pointer = int(checked(allocated, f"allocate {num_bytes / 2**20:.0f} MiB on the GPU"))
        # Kept, since at interpreter exit the module's names may be gone.
        self._free = driver.cuMemFree

    def __del__(self) -> None:
        # After a failed allocation there is nothing to free.
        if hasattr(self, "_free"):
            self._free(self.pointer)


class PinnedMemory:
    """Page-locked host memory, which the copy engines reach at full speed.

    It is there, in large pages, before the driver is asked to lock it: other threads' launches wait
    for the driver's lock, and finding and clearing memory is most of the work.
    """

    __slots__ = ("_memory", "_unlock", "num_bytes", "pointer")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(num_bytes, 1), flags=flags)
        # Not every kernel has large pages.
        with suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        content = np.frombuffer(self._memory, np.uint8)
        content[:: mmap.PAGESIZE] = 0
        self.pointer = content.ctypes.data
        locked = driver.cuMemHostRegister(self.pointer, len(content), 0)
        checked(locked, f"pin {num_bytes / 2**20:.0f} MiB of host memory")
        self._unlock = driver.cuMemHostUnregister

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.pointer, False),
        }

    def __del__(self) -> None:
        if hasattr(self, "_unlock"):
            self._unlock(self.pointer)


class CopyStream:
    """Copies to the device beside its stream, through numbered buffers that are used in turn."""

    def __init__(self, device_stream: int, num_buffers: int) -> None:
        self._device_stream = device_stream
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = checked(driver.cuStreamCreate(flags), "create a stream")
        self._copied = [_new_event() for _ in range(num_buffers)]
        self._used = [_new_event() for _ in range(num_buffers)]

    def copy(self, buffer: int, target: DeviceArray, pinned: np.ndarray[Any, Any]) -> None:
        """Copy once the buffer's last use has passed; the device's stream waits for it."""
        assert target.num_bytes == pinned.nbytes
        waited = driver.cuStreamWaitEvent(self._stream, self._used[buffer], 0)
        checked(waited, "order copies")
        address = pinned.ctypes.data
        copied = driver.cuMemcpyHtoDAsync(target.pointer, address, pinned.nbytes, self._stream)
        checked(copied, "copy to the GPU")
        checked(driver.cuEventRecord(self._copied[buffer], self._stream), "record an event")
        waited = driver.cuStreamWaitEvent(self._device_stream, self._copied[buffer], 0)
        checked(waited, "order copies")

    def mark_used(self, buffer: int) -> None:
        """What was launched on the device's stream until now is the buffer's last use."""
        checked(driver.cuEventRecord(self._used[buffer], self._device_stream), "record an event")

    def wait_until_copied(self, buffer: int) -> None:
        """Wait until the pinned side of a buffer may be written again; any thread."""
        checked(driver.cuEventSynchronize(self._copied[buffer]), "wait for a copy")

    def close(self) -> None:
        """Give stream and events back; nothing may be under way."""
        for event in self._copied + self._used:
            checked(driver.cuEventDestroy(event), "drop an event")
        checked(driver.cuStreamDestroy(self._stream), "drop a stream")


def _new_event() -> driver.CUevent:
    flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
    return checked(driver.cuEventCreate(flags), "create an event")


class Device:
    """A GPU in use. Open it with `Device.open`.

    Attributes:
        index, name: which card.
        arch: the compiler's name of its architecture, such as "sm_90a".
        num_sms: multiprocessors.
        shared_bytes_per_block: the most shared memory a block can ask for.
        total_bytes: device memory.
        stream: handle of the stream in whose order everything runs.
        computes: whether anything happens at all; see `paper_device`.
    """

    computes = True

    def __init__(self, index: int) -> None:
        self._handle = checked(driver.cuDeviceGet(index), f"find GPU {index}")
        self._context = checked(driver.cuDevicePrimaryCtxRetain(self._handle), "start the GPU")
        self.use_here()
        self.index = index
        name = checked(driver.cuDeviceGetName(128, self._handle), "name the GPU")
        self.name = name.split(b"\0")[0].decode()
        capability = (
            self._attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self.arch = architecture(capability, self.name)
        self.num_sms = self._attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.shared_bytes_per_block = self._attribute(
            _ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        )
        self.total_bytes = int(checked(driver.cuDeviceTotalMem(self._handle), "size the GPU"))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = int(checked(driver.cuStreamCreate(flags), "create a stream"))
        self._regions: dict[str, Region] = {}
        self._region = ""

    @classmethod
    def open(cls, index: int = 0) -> Device:
        """Take card `index`.

        Raises:
            NoDevice: no driver, no such card, a card before sm_80, or a driver before CUDA 13.
        """
        start_driver()
        version = checked(driver.cuDriverGetVersion(), "ask for the driver's version")
        if version < OLDEST_DRIVER:
            found = f"{version // 1000}.{version % 1000 // 10}"
            raise NoDevice(f"The NVIDIA driver supports CUDA {found}; install 580 or newer (13.0).")
        if index >= checked(driver.cuDeviceGetCount(), "count the GPUs"):
            raise NoDevice(f"There is no GPU {index}; see nvidia-smi.")
        return cls(index)

    def use_here(self) -> None:
        """Make the device current in the calling thread."""
        checked(driver.cuCtxSetCurrent(self._context), "use the GPU")

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        return int(checked(driver.cuMemGetInfo(), "ask for free memory")[0])

    # ── memory ────────────────────────────────────────────────────────────────────────────────

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Take one stretch of memory for all regions, once; arrays made within them lie there.

        Raises:
            OutOfDeviceMemory: it does not fit.
        """
        assert not self._regions
        memory = self.allocate((sum(map(aligned, sizes.values())),), ElementType.U8)
        self._regions = cut_regions(memory, sizes)

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Where arrays lie that are made meanwhile; memory of their own if none is reserved."""
        before, self._region = self._region, name
        try:
            yield
        finally:
            self._region = before

    def clear(self, region: str) -> None:
        """Give up all arrays of a region."""
        if region in self._regions:
            self._regions[region].clear()

    def used_bytes_of(self, region: str) -> int:
        """What arrays have taken of a reserved region."""
        return self._regions[region].used_bytes

    def allocate(self, shape: tuple[int, ...], dtype: ElementType | DTypeLike) -> DeviceArray:
        """A new array, its contents undefined.

        Raises:
            OutOfDeviceMemory: it does not fit.
        """
        element = ElementType.of(dtype)
        if self._region in self._regions:
            return self._regions[self._region].allocate(shape, element)
        memory = DeviceMemory(math.prod(shape) * element.num_bytes)
        return DeviceArray(memory.pointer, shape, element, memory)

    def allocate_pinned(self, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Page-locked host bytes for fast copies, `[num_bytes]`."""
        return np.asarray(PinnedMemory(num_bytes))

    def to_device(
        self, values: np.ndarray[Any, Any], dtype: ElementType | None = None
    ) -> DeviceArray:
        """A copy of host values; `dtype` says so where NumPy's type carries bf16 or fp8 bits."""
        array = self.allocate(values.shape, dtype or ElementType.of(values.dtype))
        assert array.num_bytes == values.nbytes
        self.write(array, values)
        self.synchronize()
        return array

    def to_host(self, array: DeviceArray) -> np.ndarray[Any, Any]:
        """A host copy, of the element type's carrier; waits for work before it."""
        values = np.empty(array.shape, array.dtype.carrier)
        self.read(array, values)
        self.synchronize()
        return values

    def write(self, array: DeviceArray, values: np.ndarray[Any, Any]) -> None:
        """Copy host bytes in; asynchronous when `values` is pinned, so keep it until then."""
        assert values.flags.c_contiguous
        assert values.nbytes == array.num_bytes
        address = values.ctypes.data
        copied = driver.cuMemcpyHtoDAsync(array.pointer, address, values.nbytes, self.stream)
        checked(copied, "copy to the GPU")

    def read(self, array: DeviceArray, values: np.ndarray[Any, Any]) -> None:
        """Copy bytes out into `values`; complete after `synchronize`."""
        assert values.flags.c_contiguous
        assert values.nbytes == array.num_bytes
        address = values.ctypes.data
        copied = driver.cuMemcpyDtoHAsync(address, array.pointer, values.nbytes, self.stream)
        checked(copied, "copy from the GPU")

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy between device arrays of the same size."""
        assert target.num_bytes == source.num_bytes
        copied = driver.cuMemcpyDtoDAsync(
            target.pointer, source.pointer, source.num_bytes, self.stream
        )
        checked(copied, "copy on the GPU")

    def fill(self, array: DeviceArray, byte: int) -> None:
        """Set every byte."""
        checked(
            driver.cuMemsetD8Async(array.pointer, byte, array.num_bytes, self.stream),
            "fill memory on the GPU",
        )

    def copy_stream(self, num_buffers: int) -> CopyStream:
        """A second stream, for copies that nothing else must wait for."""
        return CopyStream(self.stream, num_buffers)

    # ── time ──────────────────────────────────────────────────────────────────────────────────

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            DeviceError: something that ran has failed; the context is lost with it.
        """
        checked(driver.cuStreamSynchronize(self.stream), "finish work on the GPU")

    def new_event(self) -> driver.CUevent:
        """A mark that the stream can be given, and waited for; it has passed already."""
        return _new_event()

    def mark(self, event: driver.CUevent) -> None:
        """Have the event pass once the stream has done what it was given so far."""
        checked(driver.cuEventRecord(event, self.stream), "record an event")

    def follow(self, event: driver.CUevent) -> None:
        """What the stream is given from now on begins once the event has passed."""
        checked(driver.cuStreamWaitEvent(self.stream, event, 0), "order work")

    def wait_for(self, event: driver.CUevent) -> None:
        """Wait until an event has passed."""
        checked(driver.cuEventSynchronize(event), "wait for an event")

    def record(self) -> driver.CUevent:
        """A mark in the stream, for `elapsed_ms`."""
        event = checked(driver.cuEventCreate(0), "create an event")
        checked(driver.cuEventRecord(event, self.stream), "record an event")
        return event

    def elapsed_ms(self, start: driver.CUevent, end: driver.CUevent) -> float:
        """Milliseconds between two marks; waits for the second."""
        checked(driver.cuEventSynchronize(end), "wait for an event")
        return float(checked(driver.cuEventElapsedTime(start, end), "time events"))

    def _attribute(self, attribute: driver.CUdevice_attribute) -> int:
        value = driver.cuDeviceGetAttribute(attribute, self._handle)
        return int(checked(value, f"ask for {attribute.name}"))


def start_driver() -> None:
    """Raises NoDevice where no NVIDIA driver is installed, or none that can start."""
    try:
        started = driver.cuInit(0)
    except RuntimeError as error:
        raise NoDevice(
            "There is no NVIDIA driver on this machine; install one, or pass --device cpu."
        ) from error
    checked(started, "start the NVIDIA driver")


def architecture(capability: tuple[int, int], name: str) -> str:
    """The compiler's name for a compute capability; sm_90a carries Hopper's own instructions.

    Raises:
        NoDevice: the card is too old.
    """
    if capability < OLDEST_CARD:
        raise NoDevice(f"{name} is older than the RTX 30 series and A100, the oldest supported.")
    suffix = "a" if capability == (9, 0) else ""
    return f"sm_{capability[0]}{capability[1]}{suffix}"
