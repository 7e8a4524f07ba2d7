"""Queue, budget and failures, with a store whose writes can be held up or made to fail."""

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cache_harness import MODEL, PAGE_BYTES, STATE_BYTES, Simulated, grid_bytes, prompt

from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.cache.store import Reader, Store, WriteBatch, footprint
from daemon.checkpoint import Reason
from daemon.errors import StoreError, StoreFull

CHECKPOINT = footprint(STATE_BYTES) + footprint(PAGE_BYTES)
"""Bytes on disk of a checkpoint of one page."""


class HeldStore:
    """A store that writes only while its gate is open, and fails on demand."""

    def __init__(self, path: Path) -> None:
        self.store = Store.open_for_writing(path, 64 << 20)
        self.gate = threading.Event()
        self.gate.set()
        self.is_writing = threading.Event()
        self.failures: list[Exception] = []
        self.failing: type[StoreError] | None = None
        self.closes_again = False

    def let_one_through(self) -> None:
        self.closes_again = True
        self.gate.set()

    def write(self, batch: WriteBatch) -> None:
        self.is_writing.set()
        assert self.gate.wait(20)
        if self.closes_again:
            self.closes_again = False
            self.gate.clear()
        if self.failures:
            raise self.failures.pop(0)
        if self.failing is not None:
            raise self.failing("made to fail")
        self.store.write(batch)

    def reading(self) -> AbstractContextManager[Reader]:
        return self.store.reading()

    def close(self) -> None:
        self.store.close()


class Rig:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.time_us = 1_000_000
        self.caches: list[CheckpointCache] = []

    def open(self, *, budget_bytes: int = 64 << 20, queue_bytes: int = 1 << 20) -> CheckpointCache:
        self.store = HeldStore(self.path)
        limits = CacheLimits(
            budget_bytes=budget_bytes, queue_bytes=queue_bytes, interval_tokens=1024
        )
        cache = CheckpointCache(
            self.store,  # type: ignore[arg-type]
            limits,
            fingerprint=MODEL,
            model_name="tests",
            now_us=self.tick,
        )
        cache.flush()
        self.caches.append(cache)
        return cache

    def tick(self) -> int:
        self.time_us += 1
        return self.time_us

    def hold(self) -> None:
        self.store.gate.clear()
        self.store.is_writing.clear()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.store.gate.set()
    for cache in rig.caches:
        cache.close()


def save(cache: CheckpointCache, first: int, num_pages: int = 1, reason: Reason = "user") -> None:
    sequence = Simulated(cache, prompt(num_pages, first))
    sequence.resume()
    sequence.prefill()
    sequence.save(num_pages * 64, reason)


def restored(cache: CheckpointCache, first: int, num_pages: int = 1) -> int:
    """The position from which a prompt goes on, 0 for none; its bits are checked."""
    sequence = Simulated(cache, prompt(num_pages, first))
    found = sequence.resume()
    if found is None:
        return 0
    assert sequence.state == grid_bytes("state", sequence.tokens[: found.position], STATE_BYTES)
    assert sequence.pages == [sequence.grid_page(index) for index in range(len(sequence.pages))]
    return found.position


def test_a_full_queue_gives_up_the_least_worth_and_never_waits(rig: Rig) -> None:
    cache = rig.open(queue_bytes=3 * (PAGE_BYTES + STATE_BYTES))
    rig.hold()
    save(cache, 1, reason="interval")
    assert rig.store.is_writing.wait(20)
    reasons: list[Reason] = ["system", "interval", "prompt", "user"]
    for first, reason in enumerate(reasons, 2):
        save(cache, first, reason=reason)
    assert cache.stats().num_dropped == 2
    assert cache.stats().queue_bytes == 3 * (PAGE_BYTES + STATE_BYTES)
    rig.store.gate.set()
    cache.flush()
    assert cache.stats().queue_bytes == 0
    assert [restored(cache, first) for first in range(1, 6)] == [64, 64, 0, 64, 0]


def test_pages_of_a_checkpoint_that_was_given_up_serve_the_next(rig: Rig) -> None:
    cache = rig.open(queue_bytes=2 * STATE_BYTES + 9 * PAGE_BYTES)
    rig.hold()
    save(cache, 1)
    assert rig.store.is_writing.wait(20)
    save(cache, 2, num_pages=4, reason="interval")
    save(cache, 2, num_pages=8, reason="prompt")
    assert cache.stats().num_dropped == 1
    assert restored(cache, 2, num_pages=8) == 512
    rig.store.gate.set()
    cache.flush()
    assert restored(cache, 2, num_pages=8) == 512
    assert restored(cache, 2, num_pages=7) == 0


def test_a_lone_checkpoint_is_taken_whatever_its_size(rig: Rig) -> None:
    cache = rig.open(queue_bytes=1)
    save(cache, 1, num_pages=9)
    cache.flush()
    assert restored(cache, 1, num_pages=9) == 576


def test_reads_do_not_wait_behind_a_write(rig: Rig) -> None:
    cache = rig.open()
    save(cache, 1)
    cache.flush()
    rig.hold()
    save(cache, 2)
    assert rig.store.is_writing.wait(20)
    assert restored(cache, 1) == 64
    assert restored(cache, 2) == 64


def test_the_budget_holds_and_the_least_recently_used_goes(rig: Rig) -> None:
    cache = rig.open(budget_bytes=4 * CHECKPOINT * 16 // 13 + 16)
    for first in (1, 2, 3, 4):
        save(cache, first)
        cache.flush()
    assert restored(cache, 1) == 64
    save(cache, 5)
    cache.flush()
    assert [restored(cache, first) for first in (1, 2, 3, 4, 5)] == [64, 0, 64, 64, 64]
    stats = cache.stats()
    assert (stats.num_evicted, stats.num_checkpoints) == (1, 4)
    assert stats.num_bytes <= 4 * CHECKPOINT


def test_eviction_spares_pages_that_others_need(rig: Rig) -> None:
    cache = rig.open(budget_bytes=(2 * CHECKPOINT + footprint(PAGE_BYTES)) * 16 // 13 + 16)
    save(cache, 1, num_pages=1)
    cache.flush()
    save(cache, 1, num_pages=2)
    cache.flush()
    save(cache, 2)
    cache.flush()
    assert restored(cache, 1, num_pages=2) == 128, "with a page that it shares with what went"
    assert restored(cache, 1, num_pages=1) == 0
    assert restored(cache, 2) == 64


def test_last_use_survives_a_restart(rig: Rig) -> None:
    budget = 3 * CHECKPOINT * 16 // 13 + 16
    cache = rig.open(budget_bytes=budget)
    for first in (1, 2, 3):
        save(cache, first)
    cache.flush()
    restored(cache, 1)
    cache.close()
    cache = rig.open(budget_bytes=budget)
    save(cache, 4)
    cache.flush()
    assert [restored(cache, first) for first in (1, 2, 3, 4)] == [64, 0, 64, 64]


def test_a_smaller_budget_after_a_restart_is_kept(rig: Rig) -> None:
    cache = rig.open()
    for first in range(10):
        save(cache, first)
    cache.close()
    cache = rig.open(budget_bytes=3 * CHECKPOINT * 16 // 13 + 16)
    assert cache.stats().num_checkpoints == 3
    cache.close()
    assert rig.open().stats().num_checkpoints == 3


def test_a_checkpoint_larger_than_the_budget_evicts_nothing(rig: Rig) -> None:
    cache = rig.open(budget_bytes=2 * CHECKPOINT * 16 // 13 + 16)
    save(cache, 1)
    cache.flush()
    save(cache, 2, num_pages=9)
    cache.flush()
    assert restored(cache, 1) == 64
    assert restored(cache, 2, num_pages=9) == 0
    assert (cache.stats().num_dropped, cache.stats().num_evicted) == (1, 0)


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    cache = rig.open()
    for first in range(10):
        save(cache, first)
    cache.flush()
    rig.store.failing = StoreFull
    for first in range(10, 15):
        save(cache, first)
        cache.flush()
        assert restored(cache, first) == 0
    assert cache.stats().num_dropped == 5
    assert len(caplog.records) == 1
    assert "answers go on" in caplog.text
    kept = [first for first in range(10) if restored(cache, first)]
    assert len(kept) == 9, "room is made once; what cannot even delete makes no more"
    rig.store.failing = None
    save(cache, 20)
    cache.flush()
    assert restored(cache, 20) == 64
    cache.close()
    cache = rig.open()
    assert [first for first in range(10) if restored(cache, first)] == kept
    assert cache.stats().num_checkpoints == 10


def test_room_is_made_when_the_disk_is_full(rig: Rig) -> None:
    cache = rig.open()
    for first in range(10):
        save(cache, first)
    cache.flush()
    rig.store.failures = [StoreFull("once")]
    save(cache, 10)
    cache.flush()
    save(cache, 11)
    cache.flush()
    assert [restored(cache, first) for first in (0, 1, 10, 11)] == [0, 64, 0, 64]


def test_a_failed_write_keeps_pages_that_a_waiting_checkpoint_needs(rig: Rig) -> None:
    cache = rig.open()
    rig.hold()
    rig.store.failures = [StoreError("once")]
    save(cache, 1, num_pages=2)
    assert rig.store.is_writing.wait(20)
    save(cache, 1, num_pages=4)
    rig.store.gate.set()
    cache.flush()
    cache.close()
    cache = rig.open()
    assert restored(cache, 1, num_pages=2) == 0
    assert restored(cache, 1, num_pages=4) == 256


def test_our_own_mistake_is_logged_and_does_not_stop_the_writer(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    cache = rig.open()
    rig.store.failures = [RuntimeError("ours")]
    save(cache, 1)
    cache.flush()
    assert caplog.records[0].exc_info is not None
    save(cache, 2)
    cache.flush()
    assert restored(cache, 2) == 64


def test_a_record_dropped_while_it_is_written_is_deleted_after(rig: Rig) -> None:
    cache = rig.open()
    rig.hold()
    save(cache, 1, num_pages=2)
    assert rig.store.is_writing.wait(20)
    with cache._transfer.looking() as shelf:
        page = next(shelf.index.walk_up(next(iter(shelf.index.states)).tip))
        cache._transfer._holdings.forget(shelf.index.remove_page(page), "evicted")
    rig.store.gate.set()
    cache.flush()
    with rig.store.reading() as reader:
        assert list(reader.records("pages")) == list(reader.records("states")) == []


def test_what_loads_is_not_evicted(rig: Rig) -> None:
    cache = rig.open(budget_bytes=2 * CHECKPOINT * 16 // 13 + 16)
    save(cache, 1)
    save(cache, 2)
    cache.flush()
    key = next(s.header.key for s in cache._transfer.states() if s.used_us < rig.time_us - 1)
    with cache._transfer.holding([key]):
        save(cache, 3)
        cache.flush()
        assert key in {state.header.key for state in cache._transfer.states()}


def test_lmdb_that_cannot_read_is_a_miss(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = rig.open()
    save(cache, 1)
    cache.flush()

    def broken() -> AbstractContextManager[Reader]:
        raise StoreError("cannot be read")

    monkeypatch.setattr(rig.store, "reading", broken)
    assert restored(cache, 1) == 0
    assert cache.stats().num_damaged == 1
    assert caplog.records[0].levelno == logging.WARNING
