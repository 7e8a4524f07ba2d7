"""What was written, by day and session; and what a spent allowance keeps from the disk."""

from pathlib import Path

import pytest
from cache_harness import (
    MODEL,
    PAGE_BYTES,
    STATE_BYTES,
    Simulated,
    open_cache,
    prompt,
    saved_prompt,
)

from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.cache.policy import Candidate, Sizes, is_worth_writing
from daemon.cache.records import DamagedRecord, sealed
from daemon.cache.store import Store, footprint
from daemon.cache.write_ledger import KEPT_DAYS, WriteLedger, Writes, decode_writes, write_stats

DAY_US = 86_400 * 1_000_000


def test_sums_by_day_and_session_are_read_back_and_old_ones_go() -> None:
    ledger = WriteLedger({}, None)
    records = ledger.add(5, "a", Writes(10, 40, 1))
    records |= ledger.add(6, "a", Writes(10, 40, 1))
    records |= ledger.add(DAY_US, "ü", Writes(1, 1, 1))
    assert ledger.sums == {(0, "a"): Writes(20, 80, 2), (1, "ü"): Writes(1, 1, 1)}
    assert dict(decode_writes(k, r) for k, r in records.items() if r) == ledger.sums
    for record in (b"", b"x" * 40, sealed(b"qwWL\2\0" + b"x" * 99)):
        with pytest.raises(DamagedRecord):
            decode_writes(b"1234", record)
    stats = write_stats(ledger.sums, DAY_US, 100)
    assert (stats.today_bytes, stats.by_day) == (1, {"1970-01-01": 20, "1970-01-02": 1})
    assert stats.sharing == 81 / 21
    changes = ledger.add(KEPT_DAYS * DAY_US, "", Writes(1, 1, 1))
    assert list(changes.values()).count(None) == 1
    assert (0, "a") not in ledger.sums


def test_the_ledger_outlives_the_daemon_and_pages_shared_are_written_once(tmp_path: Path) -> None:
    for first in (True, False):
        cache = open_cache(tmp_path)
        assert (cache.stats().writes.today_bytes == 0) is first
        sequence = saved_prompt(cache, 4)
        sequence.save(128, "user")
        cache.flush()
        stats = cache.stats().writes
        pages, states = 4 * footprint(PAGE_BYTES), 2 * footprint(STATE_BYTES)
        assert stats.today_bytes == pages + states
        assert stats.sharing == (6 * footprint(PAGE_BYTES) + states) / (pages + states)
        cache.close()


def weighed(gap: int, *, is_superseded: bool = False) -> Candidate:
    return Candidate(
        reason="tool",
        position=gap,
        before=0,
        num_bytes=1,
        heat=1.0,
        used_us=0,
        is_superseded=is_superseded,
    )


def test_the_more_of_a_day_is_spent_the_more_a_checkpoint_must_save() -> None:
    sizes = Sizes(state_bytes=150 << 20, page_bytes=34 << 16, budget_bytes=20 << 30)
    shares = (0.0, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0, 2.0)

    def written(gap: int) -> int:
        return sum(is_worth_writing(weighed(gap), sizes, share) for share in shares)

    assert [written(gap) for gap in (64, 256, 1024, 10_000, 100_000)] == [2, 3, 4, 5, 6]
    assert not is_worth_writing(weighed(64, is_superseded=True), sizes, 0.0)
    assert is_worth_writing(weighed(128, is_superseded=True), sizes, 0.0)


def test_a_spent_allowance_leaves_checkpoints_in_memory(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, daily_bytes=1)
    saved_prompt(cache, 2, first=1)
    cache.flush()
    saved_prompt(cache, 2, first=2)
    cache.flush()
    stats = cache.stats()
    assert (stats.num_written, stats.num_checkpoints) == (1, 2)
    assert stats.queue_bytes > 0
    assert Simulated(cache, prompt(2, first=2)).resume() is not None
    cache.close()
    cache = open_cache(tmp_path)
    assert cache.stats().num_checkpoints == 1
    cache.close()


def test_what_is_passed_while_it_waits_is_never_written(tmp_path: Path) -> None:
    clock = [1_000_000]
    limits = CacheLimits(budget_bytes=64 << 20, interval_tokens=16_384, write_delay_s=10.0)
    cache = CheckpointCache(
        Store.open_for_writing(tmp_path, 64 << 20),
        limits,
        fingerprint=MODEL,
        model_name="tests",
        now_us=lambda: clock[0],
    )
    sequence = Simulated(cache, prompt(8))
    sequence.prefill()
    sequence.save(64, "tool")
    with cache._transfer.looking():
        assert not cache._transfer._holdings.has_due(at_once=False)
    clock[0] += 11_000_000
    sequence.save(64 * 8, "prompt")
    cache.flush()
    stats = cache.stats()
    assert (stats.num_superseded, stats.num_written, stats.num_dropped) == (1, 1, 0)
    assert stats.checkpoints_by_reason == {"prompt": 1}
    cache.close()


def test_what_was_decoded_supersedes_nothing_that_was_evaluated(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, interval_tokens=16_384)
    sequence = Simulated(cache, prompt(1))
    sequence.prefill()
    with cache._transfer.looking():
        sequence.save(64, "tool")
        sequence.decode(list(range(64)))
        sequence.save(128, "reply")
    cache.flush()
    assert cache.stats().checkpoints_by_birth == {"prompt": 1, "decode": 1}
    assert Simulated(cache, [*prompt(1), *range(64)]).resume(strict=True) is not None
    cache.close()


def test_what_waits_for_use_stays_in_memory_until_then_or_the_end(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = Simulated(cache, prompt(8))
    sequence.prefill()
    for position in (64 * 2, 64 * 4):
        sequence.save(position, "section")
    sequence.save(64 * 8, "prompt")
    wait_until_written(cache, 1)
    assert cache.stats().queue_bytes == 2 * STATE_BYTES
    sibling = Simulated(cache, [*prompt(4), *range(9000, 9256)])
    found = sibling.resume()
    assert found is not None
    assert (found.position, found.reason) == (64 * 4, "section")
    wait_until_written(cache, 2)
    assert cache.stats().queue_bytes == STATE_BYTES
    cache.close()
    cache = open_cache(tmp_path)
    assert cache.stats().checkpoints_by_reason == {"section": 2, "prompt": 1}
    cache.close()


def test_what_waits_for_use_takes_its_share_of_memory(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, queue_bytes=20 * STATE_BYTES, memory_bytes=20 * STATE_BYTES)
    sequence = Simulated(cache, prompt(30))
    sequence.prefill()
    for page in range(1, 30):
        sequence.save(64 * page, "section" if page < 10 else "head")
    sequence.save(64 * 30, "prompt")
    wait_until_written(cache, 1)
    stats = cache.stats()
    assert stats.queue_bytes == 10 * STATE_BYTES
    assert stats.checkpoints_by_reason == {"section": 9, "head": 1, "prompt": 1}
    cache.close()


def wait_until_written(cache: CheckpointCache, num_states: int) -> None:
    holdings = cache._transfer._holdings
    with cache._transfer._lock:
        assert cache._transfer._lock.wait_for(
            lambda: holdings.counts["written"] >= num_states and not cache._transfer._is_busy,
            timeout=20,
        )
