"""The end of a store: what waits is written for so long and no longer, and the log says so."""

import logging
import threading
from pathlib import Path

import pytest
from test_transfer import HeldStore, Rig, restored, save

from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.checkpoint import Reason


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_without_a_grace_nothing_more_is_written(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    cache = rig.open()
    save(cache, 0)
    cache.flush()
    rig.hold()
    for first in (1, 2, 3):
        save(cache, first)
    store: HeldStore = rig.store
    assert store.is_writing.wait(10)
    closing = threading.Thread(target=cache.close, args=(0,))
    closing.start()
    store.gate.set()
    closing.join(10)
    assert cache.stats().num_dropped == 2
    assert "2 checkpoints were not written in time" in caplog.text
    cache = rig.open()
    assert [restored(cache, first) for first in range(4)] == [64, 64, 0, 0]
    cache.close()


def close_in_the_second_write(
    rig: Rig, cache: CheckpointCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four that wait, the first is under way already; the grace ends while the second is."""
    caplog.set_level(logging.INFO)
    store: HeldStore = rig.store
    assert store.is_writing.wait(10)
    closing = threading.Thread(target=cache.close, args=(1.5,))
    closing.start()
    while "stopping: up to 4 checkpoints" not in caplog.text:
        closing.join(0.01)
    store.is_writing.clear()
    store.let_one_through()
    assert store.is_writing.wait(10)
    closing.join(2)
    assert closing.is_alive(), "a transaction is never cut"
    store.gate.set()
    closing.join(10)
    assert "2 checkpoints were not written in time" in caplog.text


def test_after_the_grace_the_write_in_progress_is_finished_and_the_newest_is_safe(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    cache = rig.open()
    rig.hold()
    for first in range(4):
        save(cache, first)
    close_in_the_second_write(rig, cache, caplog)
    cache = rig.open()
    assert [restored(cache, first) for first in range(4)] == [64, 0, 0, 64]
    cache.close()


def test_what_nobody_used_is_written_last(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    cache = rig.open()
    rig.hold()
    reasons: tuple[Reason, ...] = ("prompt", "tool", "section", "head")
    for first, reason in enumerate(reasons):
        save(cache, first, reason=reason)
    close_in_the_second_write(rig, cache, caplog)
    cache = rig.open()
    assert [restored(cache, first) for first in range(4)] == [64, 64, 0, 0]
    cache.close()


def test_with_time_enough_all_is_written(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    cache = rig.open()
    for first in range(4):
        save(cache, first)
    cache.close(20)
    assert "not written" not in caplog.text
    cache = rig.open()
    assert [restored(cache, first) for first in range(4)] == [64] * 4
    cache.close(20)
