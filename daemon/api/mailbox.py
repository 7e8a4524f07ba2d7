"""Carries a request's events from the engine thread to the event loop, and bounds what waits.

Owns the hand-over only. `put` runs on the engine thread, everything else on the event loop.
"""

import asyncio
import threading
from collections.abc import Callable

from daemon.engine.requests import Event, Started


class Mailbox:
    """Events of one request, in order, for one reader.

    A reader that is slow gets many events at once; the engine is never held up. Beyond
    `capacity` unread events the rest is dropped and `on_overflow` is called once, on the loop.

    Attributes:
        began_s: when evaluation began, by the loop's clock, read or not; None before.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        capacity: int,
        on_overflow: Callable[[], None],
    ) -> None:
        self.began_s: float | None = None
        self._loop = loop
        self._capacity = capacity
        self._on_overflow = on_overflow
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._waking = False
        self._overflowed = False
        self._ready = asyncio.Event()

    @property
    def overflowed(self) -> bool:
        """Whether events were lost because nobody read them."""
        return self._overflowed

    def put(self, event: Event) -> None:
        """Append an event (engine thread). Returns at once, never raises."""
        if isinstance(event, Started):
            self.began_s = self._loop.time()
        with self._lock:
            overflows = len(self._events) >= self._capacity and not self._overflowed
            self._overflowed |= overflows
            if not self._overflowed:
                self._events.append(event)
            wakes, self._waking = not self._waking, True
        if wakes:
            self._call(self._ready.set)
        if overflows:
            self._call(self._on_overflow)

    async def take(self, timeout_s: float) -> list[Event]:
        """All unread events; waits for one, and gives none after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return []
        with self._lock:
            events, self._events = self._events, []
            self._waking = False
            self._ready.clear()
        return events

    def _call(self, function: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            # The loop is closed, so the server is gone: there is no reader to tell.
            assert self._loop.is_closed()
