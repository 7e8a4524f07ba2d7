"""A bit flipped in any record: the bits as saved, or a clean miss, never anything else."""

import random
from pathlib import Path

import lmdb
import pytest
from cache_harness import Simulated, open_cache, prompt

from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.cache.store import DATA_FILE

NEEDLESS = ("uses", "sampled", "sessions", "writes")
"""Tables whose loss costs no checkpoint."""

TABLES = ("pages", "states", "page_payloads", "state_payloads", *NEEDLESS)


def write_store(path: Path) -> Simulated:
    cache = open_cache(path)
    sequence = Simulated(cache, prompt(3), "session")
    sequence.prefill()
    for position in (64, 128, 192):
        sequence.save(position, "user")
    sequence.decode(list(range(64)))
    sequence.decoded = sequence.save(256, "reply")  # type: ignore[attr-defined]
    cache.sampled.remember([("said", (1, 2, 3))])
    cache.catalogue.change("session", title="named", is_pinned=False)
    cache.flush()
    restored = Simulated(cache, sequence.tokens)
    assert restored.resume() is not None
    cache.close()
    return sequence


def flip(path: Path, table: str, chooser: random.Random) -> None:
    with (
        lmdb.open(str(path), max_dbs=10) as env,
        env.begin(write=True, db=env.open_db(table.encode())) as txn,
    ):
        key, value = chooser.choice(list(txn.cursor()))
        damaged = bytearray(value)
        bit = chooser.randrange(len(damaged) * 8)
        damaged[bit // 8] ^= 1 << bit % 8
        txn.put(key, bytes(damaged))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("table", TABLES)
def test_a_flipped_bit_is_a_clean_miss(tmp_path: Path, table: str, seed: int) -> None:
    saved = write_store(tmp_path)
    flip(tmp_path, table, random.Random(seed))
    cache = open_cache(tmp_path)
    for limit in (256, 192, 128, 64):
        read_until_sound(cache, saved, limit)
    assert cache.sampled.recall("said") in ((1, 2, 3), None)
    cache.flush()
    assert (cache.stats().num_damaged > 0) is (table not in NEEDLESS)
    cache.close()
    cache = open_cache(tmp_path)
    assert cache.stats().num_damaged == 0, "what was damaged is gone"
    cache.close()


def read_until_sound(cache: CheckpointCache, saved: Simulated, limit: int) -> None:
    """As the engine does: after a miss, look again; the damaged one must not be found again."""
    for _ in range(4):
        again = Simulated(cache, saved.tokens)
        found = again.timeline.find(limit, strict=False)
        if found is None:
            return
        if again.resume(limit) is not None:
            assert again.pages == saved.pages[: found.position // 64]
            return
    raise AssertionError("a damaged checkpoint was found again")


def test_records_under_exchanged_keys(tmp_path: Path) -> None:
    saved = write_store(tmp_path)
    with lmdb.open(str(tmp_path), max_dbs=10) as env:
        for table in ("pages", "page_payloads"):
            with env.begin(write=True, db=env.open_db(table.encode())) as txn:
                (one, left), (two, right) = list(txn.cursor())[:2]
                txn.put(one, right)
                txn.put(two, left)
    cache = open_cache(tmp_path)
    again = Simulated(cache, saved.tokens)
    assert (found := again.resume()) is None or again.pages == saved.pages[: found.position // 64]
    cache.flush()
    assert cache.stats().num_damaged > 0
    cache.close()


def test_the_rest_survives_a_damaged_page(tmp_path: Path) -> None:
    saved = write_store(tmp_path)
    third = saved.timeline._page_key(2, 3)
    with (
        lmdb.open(str(tmp_path), max_dbs=10) as env,
        env.begin(write=True, db=env.open_db(b"page_payloads")) as txn,
    ):
        txn.put(third + bytes(4), b"x" * saved.page_bytes)
    cache = open_cache(tmp_path)
    again = Simulated(cache, saved.tokens)
    assert again.resume() is None
    found = again.resume()
    assert found is not None
    assert found.position == 128
    assert again.pages == saved.pages[:2]
    assert cache.stats().num_checkpoints == 2
    again.prefill()
    again.save(192, "user")
    cache.close()
    cache = open_cache(tmp_path)
    healed = Simulated(cache, saved.tokens).resume(limit=192)
    assert healed is not None
    assert healed.position == 192
    cache.close()


def test_noise_in_the_data_area_of_the_file(tmp_path: Path) -> None:
    """Where LMDB itself is not hit, whatever is read is right or missing."""
    saved = write_store(tmp_path)
    file = tmp_path / DATA_FILE
    content = bytearray(file.read_bytes())
    payload = bytes(saved.pages[1])
    places = [i for i in range(len(content) - 96) if content[i : i + 96] == payload]
    assert places
    for place in places:
        content[place + 40] ^= 255
    file.write_bytes(content)
    cache = open_cache(tmp_path)
    again = Simulated(cache, saved.tokens)
    assert again.resume() is None
    assert again.resume() is not None
    assert again.pages == saved.pages[:1]
    cache.close()
