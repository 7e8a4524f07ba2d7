"""One round of making room: which stored checkpoints go, one after the other.

Owns the working order of that round; the choices are `policy`'s. Runs under `transfer`'s lock.
"""

import heapq
from collections.abc import Callable, Iterable
from itertools import islice

from daemon.cache.policy import MAX_COMPARED, Ranked, choose_victim, keep_score
from daemon.cache.prefix_index import PrefixIndex

MAX_CANDIDATES = 4096
"""Of more than these, only those used longest ago are weighed."""


class EvictionRound:
    """The order in which states go, kept right while they do: each loss makes its neighbours dear.

    Args:
        may_go: whether the state of a key may be removed now.
    """

    def __init__(self, index: PrefixIndex, now_us: int, may_go: Callable[[bytes], bool]) -> None:
        self._index = index
        self._may_go = may_go
        self._now_us = now_us
        keys = islice(filter(may_go, index.least_recently_used()), MAX_CANDIDATES)
        self._heap = self._ranked(keys)

    def next_victim(self, need_bytes: int) -> bytes | None:
        """The key of the state to remove next when so much more is wanted; None: none may go."""
        while True:
            self._settle_first()
            if not self._heap:
                return None
            lowest = heapq.nsmallest(MAX_COMPARED, self._heap)
            victim = choose_victim(self._ranked(e.key for e in lowest), need_bytes).key
            sparing = self._index.sparing(victim)
            if not sparing:
                return victim
            if stand_ins := self._ranked(filter(self._may_go, sparing)):
                return stand_ins[0].key
            self._heap = [entry for entry in self._heap if entry.key != victim]
            heapq.heapify(self._heap)

    def _settle_first(self) -> None:
        """Bring the first entry up to date, until it is the lowest as it stands."""
        while self._heap:
            ranked = self._rank(self._heap[0].key)
            if ranked is None:
                heapq.heappop(self._heap)
            elif ranked > self._heap[0]:
                heapq.heapreplace(self._heap, ranked)
            else:
                return

    def _ranked(self, keys: Iterable[bytes]) -> list[Ranked]:
        return sorted(ranked for key in keys if (ranked := self._rank(key)))

    def _rank(self, key: bytes) -> Ranked | None:
        candidate = self._index.candidate(key)
        if candidate is None:
            return None
        return Ranked(keep_score(candidate, self._now_us), key, candidate.num_bytes)
