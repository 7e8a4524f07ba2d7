"""A bit flipped in any record: the bits as saved, or a clean miss, never anything else."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import numpy as np
import pytest
from cache_harness import Simulated, open_cache, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.inspect_cache import read_store
from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.cache.damage import Damage
from daemon.cache.learned_cuts import CUTS_KEY
from daemon.cache.offline_sessions import offline_catalogue
from daemon.cache.pending_changes import PendingChanges
from daemon.cache.store import DATA_FILE
from daemon.errors import SessionFileError, StoreError

TABLES = (
    "pages", "states", "page_payloads", "state_payloads",
    "uses", "sampled", "sessions", "writes", "models", "meta",
)  # fmt: skip


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
    cache.cuts.keep((900, 7))
    cache.flush()
    restored = Simulated(cache, sequence.tokens)
    assert restored.resume() is not None
    cache.close()
    return sequence


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Simulated]:
    """A store with records of every kind, for copies; and what was saved there."""
    path = tmp_path_factory.mktemp("written")
    return path, write_store(path)


def flip(
    path: Path, table: str, draw: Callable[[int], int], in_key: bool, among: bytes = b""
) -> None:
    """Flip one bit of the key or the value of one record, of those whose keys begin with `among`;
    `draw` takes a number below its argument."""
    with (
        lmdb.open(str(path), max_dbs=11) as env,
        env.begin(write=True, db=env.open_db(table.encode(), create=False)) as txn,
    ):
        records = [record for record in txn.cursor() if record[0].startswith(among)]
        key, value = records[draw(len(records))]
        damaged = bytearray(key if in_key else value)
        bit = draw(len(damaged) * 8)
        damaged[bit // 8] ^= 1 << bit % 8
        txn.delete(key)
        txn.put(*((bytes(damaged), value) if in_key else (key, bytes(damaged))))


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=12)
@given(data=st.data(), in_key=st.booleans())
def test_a_flipped_bit_is_a_clean_miss_is_counted_and_goes(
    written: tuple[Path, Simulated], table: str, data: st.DataObject, in_key: bool
) -> None:
    source, saved = written
    with TemporaryDirectory() as folder:
        path = Path(shutil.copytree(source, Path(folder) / "store"))
        among = CUTS_KEY if table == "meta" else b""
        flip(path, table, lambda end: data.draw(st.integers(0, end - 1)), in_key, among)
        assert damaged_tables(path)
        cache = open_cache(path)
        check_nothing_is_wrong(cache, saved)
        cache.flush()
        assert cache.stats().num_damaged > 0
        cache.close()
        assert damaged_tables(path) == set(), "what was damaged is gone"
        cache = open_cache(path)
        assert cache.stats().num_damaged == 0
        cache.close()


@pytest.mark.parametrize("table", TABLES)
def test_offline_too_damage_is_told_and_goes(
    written: tuple[Path, Simulated], table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(written[0], tmp_path / "store"))
    flip(path, table, lambda _: 0, in_key=True, among=CUTS_KEY if table == "meta" else b"")
    tables = damaged_tables(path)
    assert table in tables
    with offline_catalogue(path, budget_bytes=64 << 20) as catalogue:
        catalogue.rows()
    (told,) = [record.getMessage() for record in caplog.records]
    assert all(f"{name}: 1, " in told for name in tables - {"page_payloads", "state_payloads"})
    assert damaged_tables(path) <= {"page_payloads", "state_payloads"}


@pytest.mark.parametrize("table", ["page_payloads", "state_payloads"])
def test_an_export_that_meets_damage_ends_and_drops_it(
    written: tuple[Path, Simulated], table: str, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(written[0], tmp_path / "store"))
    flip(path, table, lambda _: 0, in_key=False)
    cache = open_cache(path)
    before = cache.stats().num_checkpoints
    with pytest.raises(SessionFileError, match="cannot be exported"):
        list(cache.catalogue.export("session"))
    assert cache.stats().num_damaged == 1
    assert cache.stats().num_checkpoints < before
    cache.close()
    assert damaged_tables(path) == set()


def test_what_must_go_goes_with_the_next_transaction_that_succeeds(tmp_path: Path) -> None:
    pending = PendingChanges()
    pending.drop([Damage(table, b"key", "torn") for table in TABLES])
    pending.sampled[b"said"] = b"a reply"
    again = PendingChanges()
    again.retry(pending)
    batch = again.batch(None)
    for changes in (
        batch.uses, batch.put_sampled, batch.put_sessions,
        batch.put_writes, batch.put_meta, batch.models,
    ):  # fmt: skip
        assert dict(changes) == {b"key": None}


def check_nothing_is_wrong(cache: CheckpointCache, saved: Simulated) -> None:
    """All that can be asked is answered as saved, or as if it had never been."""
    tokens = np.asarray(saved.tokens, "<u4").tobytes()
    for past in cache.stored_prompts(1 << 20):
        assert tokens.startswith(past.tokens)
    for limit in (256, 192, 128, 64):
        read_until_sound(cache, saved, limit)
    assert cache.sampled.recall("said") in ((1, 2, 3), None)
    assert cache.cuts.known in ((900, 7), ())
    rows = cache.catalogue.rows()
    assert {row.title for row in rows} <= {"named", ""}
    now_us = time.time_ns() // 1000
    assert all(row.used_us < now_us for row in rows)
    assert set(cache.stats().writes.today_by_session) <= {"session"}


def damaged_tables(path: Path) -> set[str]:
    """As `qwend inspect --verify` sees it."""
    view = read_store(path, verify=True)
    assert view is not None
    assert {model.name for model in view.models} <= {"tests", ""}
    return {row.table for row in view.damaged}


@settings(max_examples=20)
@given(data=st.data(), in_key=st.booleans())
def test_a_store_that_does_not_know_its_version_is_refused_and_left_alone(
    written: tuple[Path, Simulated], data: st.DataObject, in_key: bool
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(shutil.copytree(written[0], Path(folder) / "store"))
        flip(path, "meta", lambda end: data.draw(st.integers(0, end - 1)), in_key, b"version")
        before = (path / DATA_FILE).read_bytes()
        with pytest.raises(StoreError):
            open_cache(path)
        assert (path / DATA_FILE).read_bytes() == before


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
