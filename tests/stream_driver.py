"""A CUDA driver without a card whose streams are real: work waits in them, and runs on a thread.

What may run next is chosen by preference, so that a test can let one stream run ahead as far as
nothing holds it back, or lag behind as long as nobody waits for it. Copies from pinned memory read
it when they run. Everything else is as in `fake_driver`.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import ModuleType
from typing import Any

from fake_driver import FakeDriver

Work = Callable[[], object]


class Recorded:
    """One setting of an event."""

    def __init__(self) -> None:
        self.has_passed = False


class StreamDriver(FakeDriver):
    """`preferred` streams run first whenever they can; all others in random order."""

    def __init__(self, real: ModuleType, rng: Random) -> None:
        super().__init__(real)
        self.preferred: set[int] = set()
        self._rng = rng
        self._changed = threading.Condition()
        self._streams: dict[int, deque[Work | Recorded]] = {}
        self._events: dict[int, Recorded] = {}
        self._pinned: dict[int, int] = {}
        self._is_over = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meanwhile work gets done."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            thread.join()

    def enqueue(self, stream: int, work: Work | Recorded) -> tuple[Any]:
        """Append to a stream; a setting of an event is waited for."""
        with self._changed:
            self._streams[int(stream)].append(work)
            self._changed.notify_all()
        return (self._status(),)

    def let_pass(self, recorded: Recorded) -> None:
        """Let go on who waits for it."""
        with self._changed:
            recorded.has_passed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._runnable())
                if not (runnable := self._runnable()):
                    return
                first = [stream for stream in runnable if stream in self.preferred]
                stream = self._rng.choice(first or runnable)
                work = self._streams[stream].popleft()
                if not isinstance(work, Recorded):
                    work()
                self._changed.notify_all()

    def _runnable(self) -> list[int]:
        return [
            stream
            for stream, works in self._streams.items()
            if works and not (isinstance(works[0], Recorded) and not works[0].has_passed)
        ]

    def cuStreamCreate(self, flags: Any) -> tuple[Any, int]:
        with self._changed:
            stream = len(self._streams) + 1
            self._streams[stream] = deque()
        return self._status(), stream

    def cuStreamSynchronize(self, stream: int) -> tuple[Any]:
        event = self.cuEventCreate(0)[1]
        self.cuEventRecord(event, stream)
        return self.cuEventSynchronize(event)

    def cuEventCreate(self, flags: Any) -> tuple[Any, int]:
        with self._changed:
            event = len(self._events) + 1
            self._events[event] = Recorded()
            self._events[event].has_passed = True
        return self._status(), event

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any]:
        recorded = self._events[event] = Recorded()
        return self.enqueue(stream, lambda: setattr(recorded, "has_passed", True))

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any]:
        return self.enqueue(stream, self._events[event])

    def cuEventSynchronize(self, event: int) -> tuple[Any]:
        recorded = self._events[event]
        with self._changed:
            assert self._changed.wait_for(lambda: recorded.has_passed, timeout=20), "a deadlock"
        return (self._status(),)

    def cuMemHostRegister(self, pointer: int, num_bytes: int, flags: int) -> tuple[Any]:
        self._pinned[pointer] = num_bytes
        return super().cuMemHostRegister(pointer, num_bytes, flags)

    def cuMemHostUnregister(self, pointer: int) -> tuple[Any]:
        del self._pinned[pointer]
        return super().cuMemHostUnregister(pointer)

    def cuMemcpyHtoDAsync(self, to: int, source: int, num_bytes: int, stream: Any) -> tuple[Any]:
        copy = super().cuMemcpyHtoDAsync
        if self._is_pinned(source):
            return self.enqueue(stream, lambda: copy(to, source, num_bytes, stream))
        # Ordinary memory is read before the call returns.
        self.cuStreamSynchronize(stream)
        return copy(to, source, num_bytes, stream)

    def cuMemcpyDtoHAsync(self, to: int, source: int, num_bytes: int, stream: Any) -> tuple[Any]:
        copy = super().cuMemcpyHtoDAsync
        self.enqueue(stream, lambda: copy(to, source, num_bytes, stream))
        return (self._status(),) if self._is_pinned(to) else self.cuStreamSynchronize(stream)

    def cuMemcpyDtoDAsync(self, to: int, source: int, num_bytes: int, stream: Any) -> tuple[Any]:
        copy = super().cuMemcpyHtoDAsync
        return self.enqueue(stream, lambda: copy(to, source, num_bytes, stream))

    def cuMemsetD8Async(self, pointer: int, byte: int, num_bytes: int, stream: Any) -> tuple[Any]:
        fill = super().cuMemsetD8Async
        return self.enqueue(stream, lambda: fill(pointer, byte, num_bytes, stream))

    def _is_pinned(self, address: int) -> bool:
        return any(0 <= address - start < size for start, size in list(self._pinned.items()))
