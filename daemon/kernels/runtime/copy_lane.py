"""Copies beside the device's stream, in one direction: a stream of their own, and a thread for it.

Whoever submits a job goes on at once; the job, on the lane's thread, gives the stream its copies
and marks. Nothing here orders a lane with the device's stream or with another lane by itself: jobs
do, by marks. Knows addresses and sizes, not what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from cuda.bindings import driver

from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.driver import checked

Addresses = np.ndarray[Any, np.dtype[np.int64]]
Result = TypeVar("Result")


class Mark:
    """A point in a stream's work that other streams and threads can wait for.

    Waiting before it is set waits for nothing.
    """

    __slots__ = ("_destroy", "event")

    def __init__(self) -> None:
        kinds = driver.CUevent_flags
        # Threads that wait for it sleep: a restore must not take a core from the engine.
        flags = kinds.CU_EVENT_DISABLE_TIMING.value | kinds.CU_EVENT_BLOCKING_SYNC.value
        self.event = checked(driver.cuEventCreate(flags), "create an event")
        self._destroy = driver.cuEventDestroy

    def __del__(self) -> None:
        if hasattr(self, "_destroy"):
            self._destroy(self.event)


class Rows(NamedTuple):
    """`num_rows` rows of `width` bytes, `pitch` bytes apart, on the device and on the host."""

    device: int
    host: int
    width: int
    pitch: int
    num_rows: int


class CopyLane:
    """Jobs run one after the other; all methods but `submit` and `drain` are for them."""

    def __init__(self, device: Device, name: str) -> None:
        self._jobs = ThreadPoolExecutor(1, name, device.use_here)

    def submit(self, job: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a job after those before it; any thread."""
        return self._jobs.submit(job, *arguments)

    def drain(self) -> None:
        """Wait until all jobs so far have ended; any thread."""
        self._jobs.submit(lambda: None).result()

    def write(self, rows: Rows) -> None:
        """Copy to the device; pinned memory must stay as it is until a later mark has passed."""
        if _is_contiguous(rows):
            num_bytes = rows.width * rows.num_rows
            copied = driver.cuMemcpyHtoDAsync(rows.device, rows.host, num_bytes, self._stream)
        else:
            copy, kinds = _strided(rows), driver.CUmemorytype
            copy.srcMemoryType = kinds.CU_MEMORYTYPE_HOST
            copy.dstMemoryType = kinds.CU_MEMORYTYPE_DEVICE
            copy.srcHost, copy.dstDevice = rows.host, rows.device
            copied = driver.cuMemcpy2DAsync(copy, self._stream)
        checked(copied, "copy to the GPU")

    def read(self, device: int, host: int, num_bytes: int) -> None:
        """Copy from the device; complete once a later mark has passed."""
        copied = driver.cuMemcpyDtoHAsync(host, device, num_bytes, self._stream)
        checked(copied, "copy from the GPU")

    def set(self, mark: Mark) -> None:
        """Have a mark pass once all copies so far are complete."""
        checked(driver.cuEventRecord(mark.event, self._stream), "record an event")

    def follow(self, mark: Mark) -> None:
        """Copies from now on begin once a mark has passed, which must be set already."""
        checked(driver.cuStreamWaitEvent(self._stream, mark.event, 0), "order copies")

    def wait_for(self, mark: Mark) -> None:
        """Wait until a mark has passed."""
        checked(driver.cuEventSynchronize(mark.event), "wait for a copy")

    @cached_property
    def _stream(self) -> int:
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(checked(driver.cuStreamCreate(flags), "create a stream"))


def runs(places: Addresses, buffers: Addresses, size: int) -> Iterator[tuple[int, int, int]]:
    """Blocks of `size` bytes that follow one another both on the device and on the host.

    Gives the addresses of a run's first block, on the device and on the host, and their number.
    """
    if not len(places):
        return
    breaks = (np.diff(places) != size) | (np.diff(buffers) != size)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(places)]
    for first, end in zip(edges, edges[1:], strict=False):
        yield int(places[first]), int(buffers[first]), end - first


def _is_contiguous(rows: Rows) -> bool:
    return rows.num_rows == 1 or rows.width == rows.pitch


def _strided(rows: Rows) -> driver.CUDA_MEMCPY2D:
    copy = driver.CUDA_MEMCPY2D()
    copy.WidthInBytes, copy.Height = rows.width, rows.num_rows
    copy.srcPitch = copy.dstPitch = rows.pitch
    return copy
