"""A recorded sequence of launches that replays with one call.

Owns capture and replay; refuses to know what was captured. Nothing may wait or allocate between
begin and end of a capture. The thread in which the device is current.
"""

from __future__ import annotations

from collections.abc import Callable

from cuda.bindings import driver

from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.driver import checked


class Graph:
    """Launches captured from a device's stream."""

    def __init__(self, device: Device, launches: Callable[[], None]) -> None:
        self._stream = device.stream
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked(driver.cuStreamBeginCapture(self._stream, mode), "begin a graph")
        try:
            launches()
        finally:
            graph = checked(driver.cuStreamEndCapture(self._stream), "end a graph")
        self._executable = checked(driver.cuGraphInstantiate(graph, 0), "prepare a graph")
        self._destroy = driver.cuGraphExecDestroy
        checked(driver.cuGraphDestroy(graph), "drop a graph")
        # Kept, since at interpreter exit the module's names may be gone.
        self._destroy = driver.cuGraphExecDestroy

    def replay(self) -> None:
        """Run all captured launches again, in the stream's order."""
        checked(driver.cuGraphLaunch(self._executable, self._stream), "replay a graph")

    def __del__(self) -> None:
        if hasattr(self, "_destroy"):
            self._destroy(self._executable)
