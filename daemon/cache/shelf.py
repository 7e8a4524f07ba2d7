"""What the store holds at one moment, on disk and on its way there, for those who look.

Owns the questions; index and queue are transfer's, which lends them with its lock held: answers
must be quick and keep nothing of them. Not thread-safe by itself.
"""

from collections.abc import Sequence

from msgspec import Struct

from daemon.cache.holdings import Holdings
from daemon.cache.records import StateHeader
from daemon.cache.write_ledger import LedgerKey, Writes
from daemon.checkpoint import Found, Reach, Tier


class TransferCounts(Struct, frozen=True, kw_only=True):
    """Counts since the store was opened, and sizes now, in bytes on disk or in memory; and what was
    written in the last days, by day and session."""

    num_pages: int
    num_bytes: int
    queue_bytes: int
    memory_bytes: int
    num_written: int
    written_bytes: int
    num_dropped: int
    num_damaged: int
    num_evicted: int
    num_superseded: int
    writes: dict[LedgerKey, Writes]


class Branch(Struct, frozen=True):
    """A state and the keys of its pages, the first page first."""

    state: StateHeader
    used_us: int
    chain: tuple[bytes, ...]


class Shelf:
    """The index, what waits to be written, and what has gone."""

    def __init__(self, holdings: Holdings) -> None:
        self.index = holdings.index
        self.queue = holdings.queue
        self.departures = holdings.departures
        self._memory = holdings.memory
        self.waiting_conversation = holdings.waiting_conversation

    def found(self, state: StateHeader) -> Found:
        """A state as the engine sees it."""
        tier: Tier = "host" if self.is_at_hand(state.key) else "disk"
        return Found(state.position, state.born, state.reason, tier)

    def is_at_hand(self, key: bytes) -> bool:
        """Whether a state is in memory."""
        return self.queue.state(key) is not None or self._memory.holds(key)

    def reach(self, hashes: Sequence[bytes], limit: int, strict: bool) -> Reach:
        """The nearest checkpoint at a position <= limit, and the nearest that was there once."""
        state = self.index.find(hashes, limit, strict)
        found = None if state is None else self.found(state)
        start = 0 if found is None else found.position
        return Reach(found, self.departures.deepest(hashes, start, limit))

    def branch(self, key: bytes) -> Branch | None:
        """A state with its pages, if it is here."""
        state = self.index.state(key)
        if state is None:
            return None
        return Branch(state, self.index.used_us(key), tuple(self.index.chain(state.tip)))

    def ancestors(self, key: bytes) -> list[StateHeader]:
        """The states on the way to a state, the nearest first."""
        state = self.index.state(key)
        return [] if state is None else list(self.index.ancestors(state))

    def beginning_with(self, hash: bytes) -> list[bytes]:
        """Keys of the states whose first page has this hash. Visits every page: for damage only."""
        return [
            state.key
            for state in self.index.states
            if self.index.chain(state.tip)[0].startswith(hash)
        ]

    def branches(self, max_tokens: int) -> list[Branch]:
        """The ends of the tree, the last used first, as many as `max_tokens` allow."""
        inner = self.index.inner_pages()
        ends = {state.tip: state for state in self.index.states if state.tip not in inner}
        keys = sorted((state.key for state in ends.values()), key=self.index.used_us, reverse=True)
        chosen: list[Branch] = []
        num_tokens = 0
        for branch in filter(None, map(self.branch, keys)):
            num_tokens += branch.state.position
            if num_tokens > max_tokens:
                break
            chosen.append(branch)
        return chosen
