"""`kill -9` in the middle of writes, and a full disk: nothing half-written, nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import saving_child
from cache_harness import grid_bytes, open_cache

from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.cache.checkpoint_reader import read_page, read_state
from daemon.cache.store import Store

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start_child(folder: Path, first: int, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, saving_child.__file__, str(folder), str(first), *more],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])},
    )


def kill_while_saving(folder: Path, first: int, chooser: random.Random) -> int:
    """Returns the last prompt that the child said was on disk."""
    child = start_child(folder, first)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("saved")
    time.sleep(chooser.uniform(0, 0.12))
    child.send_signal(signal.SIGKILL)
    lines = child.stdout.read().splitlines()
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    return max([first, *(int(line.split()[1]) for line in lines if line.count(" ") == 1)])


def assert_restored(cache: CheckpointCache, number: int) -> None:
    sequence = saving_child.sequence_of(cache, number)
    found = sequence.resume()
    assert found is not None
    assert found.position == 64 * saving_child.NUM_PAGES
    assert sequence.pages == [sequence.grid_page(i) for i in range(saving_child.NUM_PAGES)]
    assert sequence.state == grid_bytes("state", sequence.tokens, saving_child.STATE_BYTES)


def assert_every_record_is_sound(folder: Path) -> None:
    store = Store.open_for_reading(folder)
    assert store is not None
    with store.reading() as reader:
        for key, _ in reader.records("pages"):
            read_page(reader, key)
        for key, _ in reader.records("states"):
            read_state(reader, key)
    store.close()


@pytest.mark.parametrize(
    "num_kills", [15, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_killed_in_the_middle_of_writes(tmp_path: Path, num_kills: int) -> None:
    chooser = random.Random(num_kills)
    first = 0
    for _ in range(num_kills):
        last = kill_while_saving(tmp_path, first, chooser)
        assert_every_record_is_sound(tmp_path)
        cache = open_cache(tmp_path, budget_bytes=1 << 30)
        for number in range(first, last + 1):
            assert_restored(cache, number)
        assert cache.stats().num_damaged == 0
        cache.close()
        first = (last // 3 + 1) * 3


def test_a_full_disk(tmp_path: Path) -> None:
    """The file may not grow beyond 6 MB, as on a full disk: a write fails, the daemon goes on."""
    child = start_child(tmp_path, 0, str(6_000_000))
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    *_, summary = output.splitlines()
    _, num_dropped, _, num_written = summary.split()
    assert int(num_dropped) > 0
    assert int(num_written) > 10
    assert_every_record_is_sound(tmp_path)
    cache = open_cache(tmp_path, budget_bytes=1 << 30)
    stats = cache.stats()
    assert stats.num_damaged == 0
    assert stats.num_checkpoints > 0
    cache.close()
