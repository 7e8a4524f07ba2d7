"""Moves checkpoints between memory and disk, off the engine's thread.

Owns the lock over what is held and two kinds of thread: the writer, the only one that changes the
store, and readers, so that a restore never waits behind a write. The lock is never held during
I/O. Knows keys and bytes, no tokens and no tensors.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from daemon.cache.checkpoint_reader import DamagedPage, read_checkpoint
from daemon.cache.contents import StoreContents
from daemon.cache.copier import Allocate, Copier
from daemon.cache.damage import Damage, summary
from daemon.cache.holdings import SHRINK, Holdings, Limits
from daemon.cache.pending_changes import PendingChanges
from daemon.cache.policy import Sizes
from daemon.cache.records import DamagedRecord, StateHeader
from daemon.cache.sessions import StoredState, stored_states
from daemon.cache.shelf import Shelf, TransferCounts
from daemon.cache.store import Reader, Store
from daemon.cache.write_ledger import WriteLedger
from daemon.cache.write_queue import Job, QueuedPage, QueuedState
from daemon.checkpoint import Birth, Departure, Snapshot
from daemon.errors import StoreError, StoreFull

logger = logging.getLogger(__name__)

NUM_READERS = 2
POLL_S = 0.5


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Transfer:
    """Opens for business on construction; `close` writes what waits and closes the store.

    Args:
        store: opened for writing; this object closes it.
        contents: of the store; what is damaged goes with the first transaction.
        max_bytes: of all that is stored; beyond it the least recently used goes.
        queue_bytes: of payloads that wait to be written; beyond it the least worth is given up.
            A lone checkpoint is taken whatever its size.
        memory_bytes: of payloads that stay in memory beside the disk.
        write_delay_us: how long what is superseded soon, as a rule, waits to be written.
        daily_bytes: that may be written in a day; None: as many as come.
        now_us: the clock, microseconds since 1970.

    Attributes:
        num_wipes: how often checkpoints were wiped, or found wrong.
    """

    def __init__(
        self,
        store: Store,
        contents: StoreContents,
        *,
        max_bytes: int,
        queue_bytes: int,
        memory_bytes: int = 0,
        write_delay_us: int = 0,
        daily_bytes: int | None = None,
        now_us: Callable[[], int] = now_us,
    ) -> None:
        self._store = store
        self._queue_bytes = queue_bytes
        self.num_wipes = 0
        self._num_revoked: Counter[tuple[bytes, str]] = Counter()
        self._lock = threading.Condition()
        limits = Limits(max_bytes, queue_bytes, memory_bytes, write_delay_us)
        ledger = WriteLedger(contents.writes, daily_bytes)
        self._holdings = Holdings(contents.loaded, limits, ledger, now_us)
        self._drop_at_once(contents.damaged)
        self._num_hurrying = 0
        self._is_closing = False
        self._is_late = False
        self._is_busy = False
        self._is_stalled = False
        self._has_warned = False
        self._copier = Copier()
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="checkpoint-reader")
        self._writer = threading.Thread(target=self._write_all, name="checkpoint-writer")
        self._writer.daemon = True
        self._writer.start()

    def _drop_at_once(self, damaged: Sequence[Damage]) -> None:
        self._holdings.pending.drop(damaged)
        if damaged:
            logger.warning("Damaged records are dropped: %s.", summary(damaged))

    # ── on the engine's thread: memory only ───────────────────────────────────────────────────

    def births(self, hashes: Iterable[bytes]) -> list[frozenset[Birth]]:
        """For each prefix, how its states were born."""
        with self._lock:
            return [self._holdings.index.births(hash) for hash in hashes]

    def num_present(self, num_pages: int, page_key: Callable[[int], bytes]) -> int:
        """How many of a sequence's first pages are stored or queued, without a gap."""
        with self._lock:
            pages = self._holdings.index
            while num_pages > 0 and pages.page(page_key(num_pages - 1)) is None:
                num_pages -= 1
            return num_pages

    def expect(self, sizes: Sizes, allocate: Allocate) -> None:
        """Say what a checkpoint takes, on which depends whether it is worth writing, and where the
        buffers come from that it is read into."""
        with self._lock:
            self._holdings.sizes = sizes
            self._copier.allocate = allocate

    def save(
        self, state: QueuedState, pages: Sequence[QueuedPage], spares: bytes | None = None
    ) -> bool:
        """Queue a checkpoint with those of its pages that are not here yet, in their order.

        False when it was given up: it is larger than the whole budget, pages that it counted on
        have gone meanwhile, or the queue is full of worthier ones. See `Holdings.save`.
        """
        with self._lock:
            if self._is_closing:
                self._holdings.counts["dropped"] += 1
                return False
            kept = self._holdings.save(state, pages, spares)
            self._lock.notify_all()
            return kept

    def load(
        self, key: bytes, tokens: bytes
    ) -> tuple[StateHeader | None, "Future[Snapshot | None]"]:
        """Read a state and its pages on another thread, and verify them against `tokens`.

        Returns what the index says of it, and what will be read: None when it has gone or proved
        damaged; then it is not found again.
        """
        with self._lock:
            state = self._holdings.index.state(key)
            if state is None:
                nothing: Future[Snapshot | None] = Future()
                nothing.set_result(None)
                return None, nothing
            self._holdings.pin(key)
        return state, self._readers.submit(self._load, state, tokens)

    # ── on any thread ─────────────────────────────────────────────────────────────────────────

    def write_sampled(self, records: Mapping[bytes, bytes | None]) -> None:
        """Write or (None) delete records of sampled replies with the next transaction."""
        with self._lock:
            self._holdings.pending.sampled.update(records)
            self._lock.notify_all()

    def write_meta(self, records: Mapping[bytes, bytes | None]) -> None:
        """Write or (None) delete what was learned with the next transaction."""
        with self._lock:
            self._holdings.pending.meta.update(records)
            self._lock.notify_all()

    def name_model(self, fingerprint: bytes, name: str) -> None:
        """Write a model's name, for people, with the next transaction."""
        with self._lock:
            self._holdings.pending.models[fingerprint] = name
            self._lock.notify_all()

    def counts(self) -> TransferCounts:
        """Counts and sizes at this moment."""
        with self._lock:
            holdings = self._holdings
            return TransferCounts(
                num_pages=holdings.index.num_pages,
                num_bytes=holdings.index.num_bytes,
                queue_bytes=holdings.queue.num_bytes,
                memory_bytes=holdings.memory.num_bytes,
                num_written=holdings.counts["written"],
                written_bytes=holdings.counts["written_bytes"],
                num_dropped=holdings.counts["dropped"],
                num_damaged=holdings.counts["damaged"],
                num_evicted=holdings.counts["evicted"],
                num_superseded=holdings.counts["superseded"],
                writes=dict(holdings.ledger.sums),
            )

    def states(self) -> list[StoredState]:
        """All states, queued ones included."""
        with self._lock:
            queue = self._holdings.queue
            return stored_states(self._holdings.index, lambda key: queue.state(key) is not None)

    # ── for sessions, on any thread ───────────────────────────────────────────────────────────

    @contextmanager
    def looking(self) -> Iterator[Shelf]:
        """What is here at this moment; nobody else gets on meanwhile."""
        with self._lock:
            yield Shelf(self._holdings)

    def protect(self, is_protected: Callable[[StateHeader], bool]) -> None:
        """Evict none of these. Called with the lock held: it must be quick and take no other."""
        with self._lock:
            self._holdings.is_protected = is_protected

    def write_sessions(self, records: Mapping[bytes, bytes | None]) -> None:
        """Write or (None) delete records of sessions with the next transaction."""
        with self._lock:
            self._holdings.pending.sessions.update(records)
            self._lock.notify_all()

    def wipe(self, keys: Iterable[bytes], cause: Departure = "wiped") -> None:
        """Delete states, and the pages that nothing needs then; `flush` waits until it is done."""
        with self._lock:
            self.num_wipes += 1
            for key in keys:
                self._holdings.forget(self._holdings.index.remove_state(key), cause)
            self._lock.notify_all()

    def revoke(self, fingerprint: bytes, session: str) -> None:
        """Take no more of what has begun in a session: what is still evaluated for it would bring
        back what is wiped."""
        with self._lock:
            self._num_revoked[fingerprint, session] += 1

    def num_revoked(self, fingerprint: bytes, session: str) -> int:
        """How often a session was revoked."""
        with self._lock:
            return self._num_revoked[fingerprint, session]

    @property
    def folder(self) -> Path:
        """Where the store's files are."""
        return self._store.path

    def reading(self) -> AbstractContextManager[Reader]:
        """One consistent view of what is on disk."""
        return self._store.reading()

    def drop_damaged(self, key: bytes, error: DamagedRecord) -> None:
        """Drop a state that could not be read, unless it went meanwhile or is not on disk yet."""
        with self._lock:
            is_stored = self._holdings.index.state(key) and not self._holdings.queue.state(key)
        if is_stored:
            self._drop_unusable(key, error)

    @contextmanager
    def holding(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Meanwhile these states are not evicted."""
        with self._lock:
            for key in keys:
                self._holdings.pin(key)
        try:
            yield
        finally:
            with self._lock:
                for key in keys:
                    self._holdings.unpin(key)

    def wait_for_room(self) -> None:
        """Wait until half of the queue is free, or all has been written that can be."""
        with self._hurrying():
            self._lock.wait_for(
                lambda: (
                    self._holdings.queue.num_bytes <= self._queue_bytes // 2 or not self._has_work()
                )
            )

    def flush(self) -> None:
        """Wait until all that was saved before is on disk or given up."""
        with self._hurrying():
            self._lock.wait_for(lambda: not self._is_busy and not self._has_work())

    def close(self, grace_s: float | None = None) -> None:
        """Write what waits, finish the reads, close the store. Saves after this are given up.

        After `grace_s` seconds (None: without end) the write in progress is finished, and the rest
        given up: it costs evaluation, as after a kill, and is told to the log.
        """
        with self._lock:
            self._is_closing = True
            self._is_late = grace_s == 0
            self._tell_what_waits(grace_s)
            self._lock.notify_all()
        try:
            self._writer.join(grace_s)
        finally:
            with self._lock:
                self._is_late = True
        self._writer.join()
        self._tell_what_is_lost()
        self._readers.shutdown()
        self._copier.close()
        self._store.close()

    def _tell_what_waits(self, grace_s: float | None) -> None:
        num_states = len(self._holdings.queue)
        if num_states and grace_s:
            logger.info(
                "stopping: up to %d checkpoints, %.2f GB, go to disk first, for at most %g s; "
                "Ctrl-C gives them up",
                num_states, self._holdings.queue.num_bytes / 1e9, grace_s,
            )  # fmt: skip

    def _tell_what_is_lost(self) -> None:
        """What was not worth its bytes is no loss."""
        with self._lock:
            lost = self._holdings.give_up_due()
        if lost:
            logger.warning(
                "%d checkpoints were not written in time; their tokens will be evaluated again",
                lost,
            )

    # ── the writer's thread ───────────────────────────────────────────────────────────────────

    def _write_all(self) -> None:
        while True:
            with self._lock:
                self._is_busy = False
                self._lock.notify_all()
                while not (self._has_work() or self._is_closing):
                    # What waits for its time has nobody to call when that comes.
                    self._lock.wait(POLL_S if self._holdings.queue else None)
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
        at_once = self._is_closing or self._num_hurrying > 0
        if not self._is_late and self._holdings.has_due(at_once):
            return True
        return bool(self._holdings.pending) and not self._is_stalled

    @contextmanager
    def _hurrying(self) -> Iterator[None]:
        """With the lock held, and nothing due later than now."""
        with self._lock:
            self._num_hurrying += 1
            self._lock.notify_all()
            try:
                yield
            finally:
                self._num_hurrying -= 1

    def _next_transaction(self) -> tuple[Job | None, PendingChanges]:
        """Make room, then take a waiting checkpoint and all small changes.

        The oldest; when closing the newest, with which most of its conversation is safe.
        """
        self._holdings.make_room()
        job = None
        if not self._is_late:
            at_once = self._is_closing or self._num_hurrying > 0
            job = self._holdings.next_job(at_once, newest_first=self._is_closing)
        pending, self._holdings.pending = self._holdings.pending, PendingChanges()
        return job, pending

    def _after_write(self, job: Job | None) -> None:
        with self._lock:
            self._is_stalled = False
            if job is None:
                return
            self._has_warned = False
            self._holdings.settle(job)

    def _after_failure(self, job: Job | None, pending: PendingChanges, error: Exception) -> None:
        """Nothing of the transaction happened: drop its checkpoint, keep its deletions for later.

        When there was no room, some of what is stored goes: deleting alone may succeed even then.
        """
        with self._lock:
            holdings = self._holdings
            holdings.pending.retry(pending)
            self._warn(error)
            if job is None:
                self._is_stalled = True
                return
            holdings.give_up(job)
            if isinstance(error, StoreFull) and not self._is_stalled:
                holdings.make_room(int(holdings.index.num_bytes * SHRINK))

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
                wanted = self._holdings.wanted(state, tokens)
            if wanted is None:
                return None
            with self._store.reading() as reader:
                snapshot = read_checkpoint(reader, wanted, self._copier)
        except (DamagedRecord, StoreError) as error:
            self._drop_unusable(state.key, error)
            return None
        finally:
            with self._lock:
                self._holdings.unpin(state.key)
        with self._lock:
            self._holdings.restored(wanted, snapshot)
            self._lock.notify_all()
        return snapshot

    def _drop_unusable(self, key: bytes, error: Exception) -> None:
        """Drop what is wrong and all that stands on it."""
        logger.warning("A stored checkpoint cannot be used and is dropped: %s.", error)
        with self._lock:
            holdings = self._holdings
            holdings.counts["damaged"] += 1
            if isinstance(error, DamagedPage):
                holdings.forget(holdings.index.remove_page(error.key), "damaged")
            holdings.forget(holdings.index.remove_state(key), "damaged")
            self._lock.notify_all()
