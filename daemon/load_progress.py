"""How far the weights are: a bar on a terminal, lines in the log elsewhere.

Owns the wording and when something is said: never about a model that loads at once. The thread
that loads.
"""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

WORTH_TELLING_BYTES = 2**30
LOG_EVERY_S = 5.0

logger = logging.getLogger(__name__)


class LoadProgress:
    """Use as a context manager around loading.

    Args:
        console: where the bar goes; standard error.
        clock: seconds, from anywhere.
    """

    def __init__(
        self,
        name: str,
        num_bytes: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._num_bytes = num_bytes
        self._done = 0
        self._clock = clock
        self._began = self._logged = clock()
        self._is_worth_telling = num_bytes >= WORTH_TELLING_BYTES
        self._bar = _bar(console or Console(file=sys.stderr))
        self._task = self._bar.add_task(f"loading {name}", total=num_bytes)

    def __enter__(self) -> "LoadProgress":
        if self._has_bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._has_bar:
            self._bar.stop()
        if error is None and self._is_worth_telling:
            seconds = max(self._clock() - self._began, 1e-3)
            size, speed = self._num_bytes / 1e9, self._done / 1e9 / seconds
            logger.info(
                "loaded %s: %.1f GB in %.1f s (%.1f GB/s)", self._name, size, seconds, speed
            )

    def advance(self, num_bytes: int) -> None:
        """So much more is on its way."""
        self._done += num_bytes
        if self._has_bar:
            self._bar.advance(self._task, num_bytes)
        elif self._is_worth_telling and self._clock() - self._logged > LOG_EVERY_S:
            self._logged = self._clock()
            share = 100 * self._done / self._num_bytes
            logger.info("loading %s: %.0f %% of %.1f GB", self._name, share, self._num_bytes / 1e9)

    @property
    def _has_bar(self) -> bool:
        return self._is_worth_telling and self._bar.console.is_terminal


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TransferSpeedColumn(), console=console, transient=True)
