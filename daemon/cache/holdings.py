"""What is stored and what waits to be stored, and who has to go: everything that needs no I/O.

Owns index, queue, pins and pending changes, and keeps them in step: what is on disk is always in
the index or among the doomed, which the next transaction deletes. Not thread-safe: `transfer`
calls with its lock held, mostly on the engine's thread, so everything here must be quick.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from msgspec import Struct

from daemon.cache.checkpoint_reader import Wanted
from daemon.cache.departures import Departures
from daemon.cache.eviction import EvictionRound
from daemon.cache.host_memory import HostMemory
from daemon.cache.index_loader import LoadedIndex
from daemon.cache.pending_changes import PendingChanges
from daemon.cache.policy import Sizes, is_lazy, is_worth_writing, waits_for_use
from daemon.cache.prefix_index import PageRow, Removed
from daemon.cache.records import HASH_BYTES, StateHeader, Use, state_key
from daemon.cache.store import footprint
from daemon.cache.write_ledger import WriteLedger, Writes
from daemon.cache.write_queue import Job, QueuedPage, QueuedState, WriteQueue
from daemon.checkpoint import Departure, HostBytes, Snapshot

SHRINK = 0.9
"""When the disk proves full, this share of what is stored stays."""

MANY_STATES = 256
"""From so many on, making room goes 1/32 further than it must, to be rare: it weighs them all."""

UNUSED_SHARE = 4
"""Checkpoints that wait for use take at most 1/4 of the memory that stays beside the disk, and as
much of what may wait for it."""

SIDE_REQUEST_US = 10 * 60 * 1_000_000
"""So long after a conversation's last use, a shorter prompt is taken for a side request of it."""


class Limits(Struct, frozen=True):
    """Bytes: of all that is stored, on disk; of payloads that wait in memory for the disk; and of
    those that stay in memory beside it. What is superseded soon, as a rule, is written after
    `write_delay_us`."""

    max_bytes: int
    queue_bytes: int
    memory_bytes: int = 0
    write_delay_us: int = 0

    @property
    def unused_bytes(self) -> int:
        """Of checkpoints that wait for use."""
        return self.queue_bytes // UNUSED_SHARE + self.memory_bytes // UNUSED_SHARE


class Holdings:
    """See the module's docstring.

    Attributes:
        counts: of events since the store was opened, by name.
        is_protected: states that are never evicted.
        ledger: of what was written.
        sizes: what a checkpoint takes; told by the engine.
    """

    def __init__(
        self,
        loaded: LoadedIndex,
        limits: Limits,
        ledger: WriteLedger,
        now_us: Callable[[], int],
    ) -> None:
        self.index = loaded.index
        self.queue = WriteQueue()
        self.memory = HostMemory(limits.memory_bytes)
        self.departures = Departures()
        self.pending = PendingChanges(set(loaded.stale_pages), set(loaded.stale_states))
        self.counts: Counter[str] = Counter(damaged=loaded.num_damaged)
        self.is_protected: Callable[[StateHeader], bool] = lambda _: False
        self.ledger = ledger
        self.sizes = Sizes(state_bytes=1, page_bytes=1, budget_bytes=limits.max_bytes)
        self._limits = limits
        self._now_us = now_us
        self._pins: Counter[bytes] = Counter()
        self._latest = b""

    # ── coming ────────────────────────────────────────────────────────────────────────────────

    def save(self, state: QueuedState, pages: Sequence[QueuedPage], spares: bytes | None) -> bool:
        """Queue a checkpoint, unless one as good is here; False when it was given up.

        `spares` is the key of a state that must not be evicted before this one.
        """
        stored = self._as_good(state.header)
        if stored is not None:
            self.touch(stored)
        elif not self._admit(state, pages, spares):
            self.counts["dropped"] += 1
            return False
        self._relieve_queue()
        return self._as_good(state.header) is not None

    def waiting_conversation(self, num_pages: int, found: StateHeader | None) -> bytes | None:
        """The state of the conversation that a prompt of so many pages interrupts, if it does.

        A title, a summary or a sub-agent comes in between and is shorter. `found` is the state from
        which the prompt goes on: a later request of the same sub-agent interrupts the same one.
        """
        inherited = self.index.spared_by(found.key) if found else None
        state = self.index.state(inherited or self._latest)
        if state is None or state.num_pages <= num_pages:
            return None
        age_us = self._now_us() - self.index.use(state.key).used_us
        return state.key if inherited or age_us < SIDE_REQUEST_US else None

    def touch(self, key: bytes) -> None:
        """Record one more use of a state, if it is here."""
        use = self.index.touch(key, self._now_us())
        if use is not None:
            self._latest = key
            self.queue.use(key)
            if self.queue.state(key) is None:
                self.pending.touched[key] = use

    def _as_good(self, state: StateHeader) -> bytes | None:
        """The key of a state that makes saving this one needless: itself, or its better twin."""
        twins = (state_key(state.hash, "prompt"), state.key)
        return next((key for key in twins if self.index.state(key) is not None), None)

    def _admit(self, state: QueuedState, pages: Sequence[QueuedPage], spares: bytes | None) -> bool:
        """Put a checkpoint into index and queue, or leave both as they were."""
        added: list[QueuedPage] = []
        for page in pages:
            header = page.header
            if self.index.page(header.key) is not None:
                continue
            row = PageRow(header.key, header.parent, header.payload_bytes)
            if not self.index.add_page(row, header.index):
                break
            added.append(page)
        tip = self.index.page(state.header.tip)
        fits = tip is not None and self._limits.max_bytes >= tip.num_chain_bytes + footprint(
            state.header.payload_bytes
        )
        if fits and self.index.add_state(state.header, Use(used_us=self._now_us()), spares):
            self._latest = state.header.key
            self.queue.add(state, added, is_unused=waits_for_use(state.header.reason))
            self.departures.discard(state.header.hash)
            self._retire_twin(state.header)
            return True
        for page in reversed(added):
            self.index.prune(page.header.key)
        return False

    def _retire_twin(self, state: StateHeader) -> None:
        """A state born by prompt evaluation takes the place of the one that decoding made."""
        twin = state_key(state.hash, "decode")
        if state.born == "prompt" and not self._pins[twin]:
            self.forget(self.index.remove_state(twin), None)

    # ── going ─────────────────────────────────────────────────────────────────────────────────

    def make_room(self, max_bytes: int | None = None) -> None:
        """Evict what is least worth until no more than `max_bytes`, or the limit, is left."""
        max_bytes = self._limits.max_bytes if max_bytes is None else max_bytes
        if self.index.num_bytes <= max_bytes:
            return
        if self.index.num_states > MANY_STATES:
            max_bytes -= max_bytes // 32
        self._remove_least_worth(self._may_go, lambda: self.index.num_bytes - max_bytes)

    def forget(self, removed: Removed, cause: Departure | None) -> None:
        """Take what left the index out of the queue too, or doom it if it is on disk.

        `cause` None: what went has a better one in its place.
        """
        if cause is not None:
            self.departures.add((key[:HASH_BYTES] for key in removed.states), cause)
        self.pending.doomed_states.update(k for k in removed.states if not self.queue.state(k))
        self.pending.doomed_pages.update(k for k in removed.pages if not self.queue.page(k))
        self.queue.remove(removed.states, removed.pages)
        self.memory.discard((*removed.states, *removed.pages))
        for key in removed.states:
            self.pending.touched.pop(key, None)

    def pin(self, key: bytes) -> None:
        """The state is being read or written: it is not evicted meanwhile."""
        self._pins[key] += 1

    def unpin(self, key: bytes) -> None:
        """The inverse of `pin`."""
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def _relieve_queue(self) -> None:
        """Give up waiting checkpoints, the least worth first, until those that are on their way to
        the disk are in their bounds, and those that wait for use are in theirs."""
        queue, limits = self.queue, self._limits
        excess_bytes = queue.num_bytes - queue.unused_bytes - limits.queue_bytes
        if excess_bytes > 0:
            self._shrink_queue(excess_bytes, lambda key: not queue.is_unused(key))
        if queue.unused_bytes > limits.unused_bytes:
            self._shrink_queue(queue.unused_bytes - limits.unused_bytes, queue.is_unused)
        self.memory.lend(max(queue.unused_bytes - limits.queue_bytes // UNUSED_SHARE, 0))

    def _shrink_queue(self, excess_bytes: int, may_go: Callable[[bytes], bool]) -> None:
        target = self.queue.num_bytes - excess_bytes
        target -= target // 32 if len(self.queue) > MANY_STATES else 0
        self._remove_least_worth(
            lambda key: self.queue.state(key) is not None and may_go(key) and self._may_go(key),
            lambda: self.queue.num_bytes - target if len(self.queue) > 1 else 0,
        )

    def _remove_least_worth(
        self, may_go: Callable[[bytes], bool], excess: Callable[[], int]
    ) -> None:
        order = EvictionRound(self.index, self._now_us(), may_go)
        while (need_bytes := excess()) > 0:
            victim = order.next_victim(need_bytes)
            if victim is None:
                return
            is_queued = self.queue.state(victim) is not None
            cause: Departure = "dropped" if is_queued else "evicted"
            self.forget(self.index.remove_state(victim), cause)
            self.counts[cause] += 1

    def _may_go(self, key: bytes) -> bool:
        state = self.index.state(key)
        return state is not None and not self._pins[key] and not self.is_protected(state)

    # ── on their way to the disk and back ─────────────────────────────────────────────────────

    def has_due(self, at_once: bool) -> bool:
        """Whether a waiting checkpoint is to be written now; with `at_once`, none waits longer."""
        return self._due(at_once) is not None

    def next_job(self, at_once: bool, newest_first: bool = False) -> Job | None:
        """The oldest checkpoint that is due, or the newest, pinned until `settle` or `give_up`; it
        is counted."""
        self._drop_superseded()
        state = self._due(at_once, newest_first)
        if state is None:
            return None
        self.pin(state.header.key)
        job = self.queue.job(state, self.index.walk_up(state.header.tip))
        tip = self.index.page(state.header.tip)
        assert tip is not None
        state_bytes = footprint(state.header.payload_bytes)
        written = state_bytes + sum(footprint(p.header.payload_bytes) for p in job.pages)
        writes = Writes(written, state_bytes + tip.num_chain_bytes, 1)
        self.pending.writes |= self.ledger.add(self._now_us(), state.header.session, writes)
        return job

    def _drop_superseded(self) -> None:
        """What its conversation passed while it waited, and nobody will miss, is never written."""
        oldest_us = self._now_us() - self._limits.write_delay_us
        for state in list(islice(self.queue.queued(), MANY_STATES)):
            key = state.header.key
            candidate = self.index.candidate(key)
            if state.header.created_us > oldest_us or not self._may_go(key) or candidate is None:
                continue
            if candidate.is_superseded and not is_worth_writing(candidate, self.sizes, 0.0):
                self.forget(self.index.remove_state(key), None)
                self.counts["superseded"] += 1

    def give_up_due(self) -> int:
        """Count as dropped what would have been written, had there been time; how many."""
        lost = 0
        while (state := self._due(at_once=True)) is not None:
            self.forget(self.index.remove_state(state.header.key), "dropped")
            lost += 1
        self.counts["dropped"] += lost
        return lost

    def _due(self, at_once: bool, newest_first: bool = False) -> QueuedState | None:
        """The first that has waited long enough, or need not, and is worth its bytes; what nobody
        has used comes last."""
        now_us = self._now_us()
        pressure = self.ledger.pressure(now_us)
        for state in self._waiting(with_unused=at_once, newest_first=newest_first):
            header = state.header
            age_us = now_us - header.created_us
            is_late = at_once or age_us >= self._limits.write_delay_us
            if not is_late and is_lazy(header.reason, header.position, self.sizes):
                continue
            candidate = self.index.candidate(header.key)
            if candidate and is_worth_writing(candidate, self.sizes, pressure):
                return state
        return None

    def _waiting(self, with_unused: bool, newest_first: bool) -> Iterator[QueuedState]:
        for unused in (False, True) if with_unused else (False,):
            states = self.queue.queued(unused=unused)
            yield from reversed(list(states)) if newest_first else states

    def settle(self, job: Job) -> None:
        """Take what is on disk now out of the queue; doom what was dropped while it was written."""
        key = job.state.header.key
        self.unpin(key)
        self.counts["written"] += 1
        self.counts["written_bytes"] += job.num_bytes
        written: dict[bytes, HostBytes] = {}
        if self.queue.state(key) is job.state:
            self.queue.remove([key], ())
            written[key] = job.state.payload
        elif self.index.state(key) is None:
            self.pending.doomed_states.add(key)
        for page in job.pages:
            self.queue.remove((), [page.header.key])
            if self.index.page(page.header.key) is None:
                self.pending.doomed_pages.add(page.header.key)
            else:
                written[page.header.key] = page.payload
        self.memory.keep(written)

    def restored(self, wanted: Wanted, snapshot: Snapshot) -> None:
        """A checkpoint was read: it is used, and stays in memory."""
        key = wanted.state.key
        self.touch(key)
        if self.index.state(key) is wanted.state:
            pages = dict(zip(wanted.chain, snapshot.pages.values(), strict=True))
            self.memory.keep({**pages, key: snapshot.state})

    def payload(self, key: bytes) -> HostBytes | None:
        """The payload of a page or state that is in memory, because it waits or has been used."""
        queued = self.queue.state(key) or self.queue.page(key)
        return self.memory.find(key) if queued is None else queued.payload

    def give_up(self, job: Job) -> None:
        """A checkpoint that cannot be written."""
        key = job.state.header.key
        self.unpin(key)
        self.counts["dropped"] += 1
        if self.queue.state(key) is job.state:
            self.forget(self.index.remove_state(key), "dropped")

    def wanted(self, state: StateHeader, tokens: bytes) -> Wanted | None:
        """What a reader needs to know; None when the state has gone. Makes room in memory for what
        will be read."""
        if self.index.state(state.key) is not state:
            return None
        chain = self.index.chain(state.tip)
        at_hand: dict[bytes, HostBytes] = {
            key: payload
            for key in (*chain, state.key)
            if (payload := self.payload(key)) is not None
        }
        tip = self.index.page(state.tip)
        assert tip is not None
        present = sum(memoryview(payload).nbytes for payload in at_hand.values())
        self.memory.make_room(tip.num_chain_bytes + state.payload_bytes - present)
        return Wanted(state, tuple(chain), tokens, at_hand)
