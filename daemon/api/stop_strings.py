"""Finds a client's stop strings in streamed text, however the text is cut.

Owns the text that could still become a stop string. Pure; runs on the event loop.
"""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to, and without, the first stop string that occurs in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._found = ""

    @property
    def found(self) -> str:
        """The stop string that occurred, or ""; nothing is passed on after it."""
        return self._found

    def feed(self, text: str) -> str:
        """What of all text so far is certainly before any stop string, and not given out yet."""
        if not self._stops:
            return text
        if self._found:
            return ""
        self._held += text
        first = self._first_stop()
        if first is not None:
            start, self._found = first
            return self._held[:start]
        keep = self._num_possible()
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """The text held back, once no more can follow."""
        held, self._held = ("" if self._found else self._held), ""
        return held

    def _first_stop(self) -> tuple[int, str] | None:
        """The stop string that is complete first, and where it begins."""
        found = ((self._held.find(stop), stop) for stop in self._stops)
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        return min(ends)[1:] if ends else None

    def _num_possible(self) -> int:
        """Characters at the end that begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
