"""Copies payloads out of the store's file on several threads at once, and checks them on the way.

Owns the threads. Copies and checksums let the interpreter's lock go, so neither waits for the
engine's thread nor keeps it waiting. The buffers are whoever's it is told to ask.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from daemon.cache.records import checksum
from daemon.checkpoint import HostBytes

NUM_COPIERS = 4

Allocate = Callable[[int], memoryview]
"""A buffer of so many bytes, of undefined content; any thread, never waits."""


def plain_buffer(num_bytes: int) -> memoryview:
    """Ordinary memory."""
    return np.empty(num_bytes, np.uint8).data


class Copier:
    """Used by reading threads, each while its view of the store is open."""

    def __init__(self) -> None:
        self.allocate: Allocate = plain_buffer
        self._threads = ThreadPoolExecutor(NUM_COPIERS, thread_name_prefix="checkpoint-copier")

    def copy(self, chunks: Sequence[memoryview], payload_sum: int) -> "Future[HostBytes | None]":
        """Put chunks together in a buffer; None when they do not have the checksum.

        Buffers are asked for in the order of calls: neighbours go to the device in one copy.
        """
        buffer = self.allocate(sum(chunk.nbytes for chunk in chunks))
        return self._threads.submit(self._copy, chunks, payload_sum, buffer)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    @staticmethod
    def _copy(
        chunks: Sequence[memoryview], payload_sum: int, buffer: memoryview
    ) -> HostBytes | None:
        target = np.frombuffer(buffer, np.uint8)
        start = 0
        for chunk in chunks:
            target[start : start + chunk.nbytes] = np.frombuffer(chunk, np.uint8)
            start += chunk.nbytes
        return buffer if checksum(buffer) == payload_sum else None
