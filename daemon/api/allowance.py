"""How much one key may ask for: requests a minute, and requests at the same time.

Owns the counts. Event loop only.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

from daemon.errors import TooManyRequests

BUSY_RETRY_S = 2


class Allowances:
    """A bucket a key, which holds `per_minute` requests and is filled evenly; None: no limit."""

    def __init__(
        self, per_minute: int | None, parallel: int | None, now: Callable[[], float]
    ) -> None:
        self._per_minute = per_minute
        self._parallel = parallel
        self._now = now
        self._running: defaultdict[int, int] = defaultdict(int)
        self._buckets: dict[int, tuple[float, float]] = {}

    @contextmanager
    def taken_by(self, key: int) -> Iterator[None]:
        """Counts a request of `key` while it runs.

        Raises:
            TooManyRequests: says when a retry makes sense.
        """
        if self._parallel is not None and self._running[key] >= self._parallel:
            raise TooManyRequests(
                f"{self._parallel} requests of this key are running already.", BUSY_RETRY_S
            )
        self._take(key)
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1

    def _take(self, key: int) -> None:
        if self._per_minute is None:
            return
        now = self._now()
        level, since = self._buckets.get(key, (float(self._per_minute), now))
        level = min(self._per_minute, level + (now - since) * self._per_minute / 60)
        if level < 1:
            self._buckets[key] = level, now
            wait_s = ceil((1 - level) * 60 / self._per_minute)
            raise TooManyRequests(
                f"This key may send {self._per_minute} requests a minute.", wait_s
            )
        self._buckets[key] = level - 1, now
