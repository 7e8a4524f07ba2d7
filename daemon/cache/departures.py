"""Which checkpoints were here once and why they went, so that a miss can be explained.

Owns a bounded memory of prefix hashes, the oldest forgotten first; nothing of it is on disk. Not
thread-safe: `transfer` guards it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from daemon.checkpoint import PAGE_TOKENS, Departed, Departure

MAX_DEPARTURES = 1 << 16


class Departures:
    """The last checkpoints that went, by the hash of their prefix."""

    def __init__(self, max_departures: int = MAX_DEPARTURES) -> None:
        self._max_departures = max_departures
        self._causes: OrderedDict[bytes, Departure] = OrderedDict()

    def add(self, hashes: Iterable[bytes], cause: Departure) -> None:
        """Record that the states of these prefixes went."""
        for hash in hashes:
            self._causes[hash] = cause
            self._causes.move_to_end(hash)
        while len(self._causes) > self._max_departures:
            self._causes.popitem(last=False)

    def discard(self, hash: bytes) -> None:
        """A state is here again."""
        self._causes.pop(hash, None)

    def deepest(self, hashes: Sequence[bytes], start: int, stop: int) -> Departed | None:
        """The last of a chain's prefixes of more than `start` and at most `stop` tokens that had a
        checkpoint once."""
        first, last = start // PAGE_TOKENS, min(stop // PAGE_TOKENS, len(hashes))
        for index in range(last - 1, first - 1, -1):
            if cause := self._causes.get(hashes[index]):
                return Departed((index + 1) * PAGE_TOKENS, cause)
        return None
