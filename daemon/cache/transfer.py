"""Moves checkpoints between memory and disk, off the engine's thread.

Owns the index, the queue and two kinds of thread: the writer, the only one that changes the store,
and readers, so that a restore never waits behind a write. One lock guards index and queue; it is
never held during I/O. What is on disk is always in the index or among the doomed, which the next
transaction deletes. Knows keys and bytes, no tokens and no tensors.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from daemon.cache.checkpoint_reader import DamagedPage, Wanted, read_checkpoint
from daemon.cache.departures import Departures
from daemon.cache.index_loader import load_index
from daemon.cache.pending_changes import PendingChanges
from daemon.cache.policy import Candidate, drop_order, eviction_order
from daemon.cache.prefix_index import PageRow, Removed
from daemon.cache.records import HASH_BYTES, DamagedRecord, StateHeader, state_key
from daemon.cache.sessions import StoredState, stored_states
from daemon.cache.shelf import Shelf, TransferCounts
from daemon.cache.store import Reader, Store, footprint
from daemon.cache.write_queue import Job, QueuedPage, QueuedState, WriteQueue
from daemon.checkpoint import Birth, Departure, HostBytes, Snapshot
from daemon.errors import StoreError, StoreFull

logger = logging.getLogger(__name__)

NUM_READERS = 2
_SHRINK = 0.9
"""When the disk proves full, this share of what is stored stays."""


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Transfer:
    """Opens for business on construction; `close` writes what waits and closes the store.

    Args:
        store: opened for writing; this object closes it.
        max_bytes: of all that is stored; beyond it the least recently used goes.
        queue_bytes: of payloads that wait to be written; beyond it the least worth is given up.
            A lone checkpoint is taken whatever its size.
        now_us: the clock, microseconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_bytes: int,
        queue_bytes: int,
        now_us: Callable[[], int] = now_us,
    ) -> None:
        with store.reading() as reader:
            loaded = load_index(reader)
        self._store = store
        self._max_bytes = max_bytes
        self._queue_bytes = queue_bytes
        self._now_us = now_us
        self._lock = threading.Condition()
        self._index = loaded.index
        self._queue = WriteQueue()
        self._pending = PendingChanges(set(loaded.stale_pages), set(loaded.stale_states))
        self._pins: Counter[bytes] = Counter()
        self._departures = Departures()
        self._is_protected: Callable[[StateHeader], bool] = lambda _: False
        self._counts: Counter[str] = Counter(damaged=loaded.num_damaged)
        self._is_closing = False
        self._is_busy = False
        self._is_stalled = False
        self._has_warned = False
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="checkpoint-reader")
        self._writer = threading.Thread(target=self._write_all, name="checkpoint-writer")
        self._writer.daemon = True
        self._writer.start()

    # ── on the engine's thread: memory only ───────────────────────────────────────────────────

    def births(self, hashes: Iterable[bytes]) -> list[frozenset[Birth]]:
        """For each prefix, how its states were born."""
        with self._lock:
            return [self._index.births(hash) for hash in hashes]

    def num_present(self, num_pages: int, page_key: Callable[[int], bytes]) -> int:
        """How many of a sequence's first pages are stored or queued, without a gap."""
        with self._lock:
            while num_pages > 0 and self._index.page(page_key(num_pages - 1)) is None:
                num_pages -= 1
            return num_pages

    def save(self, state: QueuedState, pages: Sequence[QueuedPage]) -> bool:
        """Queue a checkpoint with those of its pages that are not here yet, in their order.

        False when it was given up: it is larger than the whole budget, pages that it counted on
        have gone meanwhile, or the queue is full of worthier ones.
        """
        with self._lock:
            stored = self._as_good(state.header)
            if stored is not None:
                self._touch(stored)
            elif self._is_closing or not self._admit(state, pages):
                self._counts["dropped"] += 1
                return False
            self._relieve_queue()
            self._lock.notify_all()
            return self._as_good(state.header) is not None

    def load(
        self, key: bytes, tokens: bytes
    ) -> tuple[StateHeader | None, "Future[Snapshot | None]"]:
        """Read a state and its pages on another thread, and verify them against `tokens`.

        Returns what the index says of it, and what will be read: None when it has gone or proved
        damaged; then it is not found again.
        """
        with self._lock:
            state = self._index.state(key)
            if state is None:
                nothing: Future[Snapshot | None] = Future()
                nothing.set_result(None)
                return None, nothing
            self._pins[key] += 1
        return state, self._readers.submit(self._load, state, tokens)

    # ── on any thread ─────────────────────────────────────────────────────────────────────────

    def write_sampled(self, records: Mapping[bytes, bytes | None]) -> None:
        """Write or (None) delete records of sampled replies with the next transaction."""
        with self._lock:
            self._pending.sampled.update(records)
            self._lock.notify_all()

    def name_model(self, fingerprint: bytes, name: str) -> None:
        """Write a model's name, for people, with the next transaction."""
        with self._lock:
            self._pending.models[fingerprint] = name
            self._lock.notify_all()

    def counts(self) -> TransferCounts:
        """Counts and sizes at this moment."""
        with self._lock:
            return TransferCounts(
                num_pages=self._index.num_pages,
                num_bytes=self._index.num_bytes,
                queue_bytes=self._queue.num_bytes,
                num_written=self._counts["written"],
                written_bytes=self._counts["written_bytes"],
                num_dropped=self._counts["dropped"],
                num_damaged=self._counts["damaged"],
                num_evicted=self._counts["evicted"],
            )

    def states(self) -> list[StoredState]:
        """All states, queued ones included."""
        with self._lock:
            return stored_states(self._index, lambda key: self._queue.state(key) is not None)

    # ── for sessions, on any thread ───────────────────────────────────────────────────────────

    @contextmanager
    def looking(self) -> Iterator[Shelf]:
        """What is here at this moment; nobody else gets on meanwhile."""
        with self._lock:
            yield Shelf(self._index, self._queue, self._departures)

    def protect(self, is_protected: Callable[[StateHeader], bool]) -> None:
        """Evict none of these. Called with the lock held: it must be quick and take no other."""
        with self._lock:
            self._is_protected = is_protected

    def write_sessions(self, records: Mapping[bytes, bytes | None]) -> None:
        """Write or (None) delete records of sessions with the next transaction."""
        with self._lock:
            self._pending.sessions.update(records)
            self._lock.notify_all()

    def wipe(self, keys: Iterable[bytes], cause: Departure = "wiped") -> None:
        """Delete states, and the pages that nothing needs then; `flush` waits until it is done."""
        with self._lock:
            for key in keys:
                self._forget(self._index.remove_state(key), cause)
            self._lock.notify_all()

    @property
    def folder(self) -> Path:
        """Where the store's files are."""
        return self._store.path

    def reading(self) -> AbstractContextManager[Reader]:
        """One consistent view of what is on disk."""
        return self._store.reading()

    @contextmanager
    def holding(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Meanwhile these states are not evicted."""
        with self._lock:
            self._pins.update(keys)
        try:
            yield
        finally:
            with self._lock:
                for key in keys:
                    self._unpin(key)

    def wait_for_room(self) -> None:
        """Wait until half of the queue is free, or all has been written that can be."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._queue.num_bytes <= self._queue_bytes // 2 or not self._has_work()
            )

    def flush(self) -> None:
        """Wait until all that was saved before is on disk or given up."""
        with self._lock:
            self._lock.wait_for(lambda: not self._is_busy and not self._has_work())

    def close(self) -> None:
        """Write what waits, finish the reads, close the store. Saves after this are given up."""
        with self._lock:
            self._is_closing = True
            self._lock.notify_all()
        self._writer.join()
        self._readers.shutdown()
        self._store.close()

    # ── saving, with the lock held ────────────────────────────────────────────────────────────

    def _as_good(self, state: StateHeader) -> bytes | None:
        """The key of a state that makes saving this one needless: itself, or its better twin."""
        twins = (state_key(state.hash, "prompt"), state.key)
        return next((key for key in twins if self._index.state(key) is not None), None)

    def _admit(self, state: QueuedState, pages: Sequence[QueuedPage]) -> bool:
        """Put a checkpoint into index and queue, or leave both as they were."""
        added: list[QueuedPage] = []
        for page in pages:
            header = page.header
            if self._index.page(header.key) is not None:
                continue
            row = PageRow(header.key, header.parent, header.payload_bytes)
            if not self._index.add_page(row, header.index):
                break
            added.append(page)
        tip = self._index.page(state.header.tip)
        fits = tip is not None and self._max_bytes >= tip.num_chain_bytes + footprint(
            state.header.payload_bytes
        )
        if fits and self._index.add_state(state.header, self._now_us()):
            self._queue.add(state, added)
            self._departures.discard(state.header.hash)
            return True
        for page in reversed(added):
            self._index.prune(page.header.key)
        return False

    def _relieve_queue(self) -> None:
        """Give up waiting checkpoints, the least worth first, until the queue is in its bounds."""

        def is_over() -> bool:
            return self._queue.num_bytes > self._queue_bytes and len(self._queue) > 1

        if is_over():
            self._give_up(is_over)

    def _give_up(self, is_over: Callable[[], bool]) -> None:
        for row in drop_order(self._candidates(is_queued=True)):
            if not is_over():
                return
            self._forget(self._index.remove_state(row.key), "dropped")
            self._counts["dropped"] += 1

    def _forget(self, removed: Removed, cause: Departure) -> None:
        """Take what left the index out of the queue too, or doom it if it is on disk."""
        self._departures.add((key[:HASH_BYTES] for key in removed.states), cause)
        self._pending.doomed_states.update(k for k in removed.states if not self._queue.state(k))
        self._pending.doomed_pages.update(k for k in removed.pages if not self._queue.page(k))
        self._queue.remove(removed.states, removed.pages)
        for key in removed.states:
            self._pending.touched.pop(key, None)

    def _candidates(self, is_queued: bool) -> list[Candidate]:
        """Checkpoints that may go: none that is being read or written, none of a pinned session."""
        return [
            Candidate(s.key, s.reason, s.born, s.position, self._index.used_us(s.key))
            for s in (self._queue.states if is_queued else self._index.states)
            if not self._pins[s.key]
            and not self._is_protected(s)
            and (self._queue.state(s.key) is not None) is is_queued
        ]

    def _touch(self, key: bytes) -> None:
        used_us = self._now_us()
        if self._index.touch(key, used_us) and self._queue.state(key) is None:
            self._pending.touched[key] = used_us
            self._lock.notify_all()

    # ── the writer's thread ───────────────────────────────────────────────────────────────────

    def _write_all(self) -> None:
        while True:
            with self._lock:
                self._is_busy = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._has_work() or self._is_closing)
                if not self._has_work():
                    return
                self._is_busy = True
                job, pending = self._next_transaction()
            try:
                self._store.write(pending.batch(job))
            except Exception as error:
                self._after_failure(job, pending, error)
            else:
                self._after_write(job)

    def _has_work(self) -> bool:
        return bool(self._queue) or (bool(self._pending) and not self._is_stalled)

    def _next_transaction(self) -> tuple[Job | None, PendingChanges]:
        """Make room, then take the oldest waiting checkpoint and all small changes."""
        self._make_room(self._max_bytes)
        state = self._queue.oldest()
        job = None
        if state is not None:
            job = self._queue.job(state, self._index.walk_up(state.header.tip))
            self._pins[state.header.key] += 1
        pending, self._pending = self._pending, PendingChanges()
        return job, pending

    def _make_room(self, max_bytes: int) -> None:
        """Evict what is stored, then give up what waits, until no more than `max_bytes` is left."""
        if self._index.num_bytes <= max_bytes:
            return
        for row in eviction_order(self._candidates(is_queued=False)):
            if self._index.num_bytes <= max_bytes:
                return
            self._forget(self._index.remove_state(row.key), "evicted")
            self._counts["evicted"] += 1
        self._give_up(lambda: self._index.num_bytes > max_bytes)

    def _after_write(self, job: Job | None) -> None:
        with self._lock:
            self._is_stalled = False
            if job is None:
                return
            self._has_warned = False
            self._unpin(job.state.header.key)
            self._counts["written"] += 1
            self._counts["written_bytes"] += job.num_bytes
            self._settle(job)

    def _settle(self, job: Job) -> None:
        """Take what is on disk now out of the queue; doom what was dropped while it was written."""
        key = job.state.header.key
        if self._queue.state(key) is job.state:
            self._queue.remove([key], ())
        elif self._index.state(key) is None:
            self._pending.doomed_states.add(key)
        for page in job.pages:
            self._queue.remove((), [page.header.key])
            if self._index.page(page.header.key) is None:
                self._pending.doomed_pages.add(page.header.key)

    def _after_failure(self, job: Job | None, pending: PendingChanges, error: Exception) -> None:
        """Nothing of the transaction happened: drop its checkpoint, keep its deletions for later.

        When there was no room, some of what is stored goes: deleting alone may succeed even then.
        """
        with self._lock:
            self._pending.doomed_pages |= pending.doomed_pages
            self._pending.doomed_states |= pending.doomed_states
            self._pending.sessions = pending.sessions | self._pending.sessions
            self._warn(error)
            if job is None:
                self._is_stalled = True
                return
            self._unpin(job.state.header.key)
            self._counts["dropped"] += 1
            if self._queue.state(job.state.header.key) is job.state:
                self._forget(self._index.remove_state(job.state.header.key), "dropped")
            if isinstance(error, StoreFull) and not self._is_stalled:
                self._make_room(int(self._index.num_bytes * _SHRINK))

    def _warn(self, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        # A StoreError is the world's fault and says so in a line; anything else is ours.
        trace = None if isinstance(error, StoreError) else error
        logger.error("A checkpoint was not kept; answers go on. %s", error, exc_info=trace)

    # ── a reader's thread ─────────────────────────────────────────────────────────────────────

    def _load(self, state: StateHeader, tokens: bytes) -> Snapshot | None:
        try:
            with self._lock:
                wanted = self._wanted(state, tokens)
            if wanted is None:
                return None
            with self._store.reading() as reader:
                snapshot = read_checkpoint(reader, wanted)
        except (DamagedRecord, StoreError) as error:
            self._drop_damaged(state.key, error)
            return None
        finally:
            with self._lock:
                self._unpin(state.key)
        with self._lock:
            self._touch(state.key)
        return snapshot

    def _wanted(self, state: StateHeader, tokens: bytes) -> Wanted | None:
        if self._index.state(state.key) is not state:
            return None
        chain = self._index.chain(state.tip)
        queued: dict[bytes, HostBytes] = {}
        for key in chain:
            page = self._queue.page(key)
            if page is not None:
                queued[key] = page.payload
        waiting = self._queue.state(state.key)
        if waiting is not None:
            queued[state.key] = waiting.payload
        return Wanted(state, tuple(chain), tokens, queued)

    def _drop_damaged(self, key: bytes, error: Exception) -> None:
        """Drop what is wrong and all that stands on it."""
        logger.warning("A stored checkpoint cannot be used and is dropped: %s.", error)
        with self._lock:
            self._counts["damaged"] += 1
            if isinstance(error, DamagedPage):
                self._forget(self._index.remove_page(error.key), "damaged")
            self._forget(self._index.remove_state(key), "damaged")
            self._lock.notify_all()

    def _unpin(self, key: bytes) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
