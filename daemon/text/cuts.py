"""Where clients cut tools' results when their history grows long: a place learned from one serves
all.

Owns which distances, in characters, are remembered: the latest seen; knows no text, and not how
they outlive the process. Safe on any thread: what is read is replaced, never changed.
"""

from typing import Protocol

MAX_CUTS = 4
MIN_CUT = 128
"""Fewer characters than this are no page."""


class CutMemory(Protocol):
    """Keeps the distances."""

    @property
    def known(self) -> tuple[int, ...]:
        """What was kept last."""
        ...

    def keep(self, cuts: tuple[int, ...]) -> None:
        """Keep these instead; returns at once."""
        ...


class UnsavedCuts:
    """Keeps them as long as the process lives."""

    def __init__(self) -> None:
        self.known: tuple[int, ...] = ()

    def keep(self, cuts: tuple[int, ...]) -> None:
        """Keep these instead."""
        self.known = cuts


class Cuts:
    """How many characters of a result's beginning were left, each time another number."""

    def __init__(self, memory: CutMemory) -> None:
        self._memory = memory

    @property
    def known(self) -> tuple[int, ...]:
        """The latest of those seen, MAX_CUTS at most, the latest last."""
        return self._memory.known[-MAX_CUTS:]

    def learn(self, cut: int) -> bool:
        """One more was seen; whether it is new. Of more than MAX_CUTS the oldest is forgotten."""
        known = self.known
        if cut < MIN_CUT:
            return False
        self._memory.keep((*(other for other in known if other != cut), cut)[-MAX_CUTS:])
        return cut not in known
