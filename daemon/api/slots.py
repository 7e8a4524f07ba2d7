"""The numbers by which llama-server's tools know the replies that an engine works on.

Owns who has which: the lowest that is free when one begins, the same until it ends. Any thread.
"""

import threading
from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)


class Slots(Generic[H]):
    """Numbers from 0 on, each with its holder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[int, H] = {}

    def take(self, holder: H) -> None:
        """Give one that begins the lowest free number, unless it has one."""
        with self._lock:
            if holder not in self._holders.values():
                number = next(number for number in count() if number not in self._holders)
                self._holders[number] = holder

    def release(self, holder: H) -> None:
        """Free the number of one that has ended, if it has one."""
        with self._lock:
            self._holders = {n: other for n, other in self._holders.items() if other != holder}

    def held(self) -> dict[int, H]:
        """Who has which at this moment."""
        with self._lock:
            return dict(self._holders)
