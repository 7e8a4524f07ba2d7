import os
import struct
from pathlib import Path

import lmdb
import pytest

from daemon.cache import store as store_module
from daemon.cache.records import (
    FORMAT_VERSION,
    LAST_BARE_VERSION,
    DamagedRecord,
    Use,
    decode_model,
    decode_use,
)
from daemon.cache.store import CHUNK_BYTES, DATA_FILE, VERSION_KEY, Store, WriteBatch, footprint
from daemon.errors import ConfigError, StoreError, StoreFull, StoreInUse, StoreVersionError

PAGE = b"p" * 24
STATE = b"s" * 17


def open_store(path: Path, max_bytes: int = 16 << 20) -> Store:
    return Store.open_for_writing(path, max_bytes)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7])
def test_payloads_of_any_length_come_back(tmp_path: Path, size: int) -> None:
    store = open_store(tmp_path)
    payload = os.urandom(size)
    store.write(WriteBatch(put_pages=[(PAGE, b"header", memoryview(payload))]))
    with store.reading() as reader:
        assert reader.header("pages", PAGE) == b"header"
        assert reader.payload("pages", PAGE, size) == payload
        with pytest.raises(DamagedRecord):
            reader.payload("pages", PAGE, size + CHUNK_BYTES)
    store.close()


def test_a_payload_of_numpys_shape_is_taken(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    store = open_store(tmp_path)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    store.write(WriteBatch(put_state=(STATE, b"header", values.data)))
    with store.reading() as reader:
        assert reader.payload("states", STATE, 48) == values.tobytes()
    store.close()


USE = Use(used_us=7, heat=1.5)


def test_deleting_takes_payload_and_use_along_and_no_neighbour(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    neighbour = STATE[:-1] + b"t"
    for key in (STATE, neighbour):
        payload = bytes(2 * CHUNK_BYTES)
        store.write(WriteBatch(put_state=(key, b"header", payload), uses={key: USE}))
    store.write(WriteBatch(delete_states=[STATE]))
    with store.reading() as reader:
        assert [key for key, _ in reader.records("states")] == [neighbour]
        assert [(key, decode_use(key, use)) for key, use in reader.records("uses")] == [
            (neighbour, USE)
        ]
        assert reader.payload("states", neighbour, 2 * CHUNK_BYTES) == bytes(2 * CHUNK_BYTES)
        with pytest.raises(DamagedRecord):
            reader.payload("states", STATE, 1)
    store.close()


def test_a_state_does_not_take_its_last_pages_payload_along(tmp_path: Path) -> None:
    """A state's key is the beginning of the key of its last page, where that is on the grid."""
    store = open_store(tmp_path)
    page = STATE + bytes(7)
    store.write(WriteBatch(put_pages=[(page, b"page", b"1")], put_state=(STATE, b"state", b"2")))
    store.write(WriteBatch(delete_states=[STATE]))
    with store.reading() as reader:
        assert reader.payload("pages", page, 1) == b"1"
    store.close()


def test_deletions_come_before_records(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(WriteBatch(put_state=(STATE, b"old", bytes(2 * CHUNK_BYTES))))
    store.write(WriteBatch(delete_states=[STATE], put_state=(STATE, b"new", b"new")))
    with store.reading() as reader:
        assert reader.header("states", STATE) == b"new"
        assert reader.payload("states", STATE, 3) == b"new"
    store.close()


def test_too_much_for_the_map_changes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, 4 << 20)
    store.write(WriteBatch(put_state=(STATE, b"header", b"kept")))
    with pytest.raises(StoreFull, match="fill their budget"):
        store.write(
            WriteBatch(delete_states=[STATE], put_pages=[(PAGE, b"header", bytes(5 << 20))])
        )
    with store.reading() as reader:
        assert reader.payload("states", STATE, 4) == b"kept"
        assert list(reader.records("pages")) == []
    assert (tmp_path / DATA_FILE).stat().st_size <= 4 << 20
    store.close()


def test_space_of_deleted_payloads_is_used_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, 8 << 20)
    for number in range(40):
        keys = [bytes([number, n]) + b"p" * 22 for n in range(4)]
        store.write(WriteBatch(put_pages=[(key, b"header", bytes(CHUNK_BYTES)) for key in keys]))
        store.write(WriteBatch(delete_pages=keys))
    assert (tmp_path / DATA_FILE).stat().st_size <= 8 << 20
    store.close()


def test_one_writer_and_any_readers(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(StoreInUse):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()


def test_opening_for_reading_what_is_absent(tmp_path: Path) -> None:
    assert Store.open_for_reading(tmp_path / "nowhere") is None
    assert Store.open_for_reading(tmp_path) is None
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="not a folder"):
        Store.open_for_reading(file)


def test_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    open_store(folder).close()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FORMAT_VERSION", FORMAT_VERSION + 1)
    open_store(tmp_path).close()
    monkeypatch.undo()
    for open_ in (open_store, Store.open_for_reading):
        with pytest.raises(StoreVersionError, match=f"have format {FORMAT_VERSION + 1}"):
            open_(tmp_path)
    monkeypatch.setattr(store_module, "FORMAT_VERSION", FORMAT_VERSION + 1)
    open_store(tmp_path).close()


def test_an_older_store_is_brought_up_to_date_by_a_writer(tmp_path: Path) -> None:
    """Its uses, models' names and version had no checksum; a reader is told what to do."""
    store = open_store(tmp_path)
    store.write(WriteBatch(put_state=(STATE, b"header", b"1")))
    store.close()
    with lmdb.open(str(tmp_path), max_dbs=11) as env:
        for table, key, value in (
            (b"uses", STATE, struct.pack("<Qd", 7, 1.5)),
            (b"models", b"fingerprint", "tïny".encode()),
            (b"meta", VERSION_KEY, LAST_BARE_VERSION.to_bytes(4, "little")),
        ):
            with env.begin(write=True, db=env.open_db(table, create=False)) as txn:
                txn.put(key, value)
    with pytest.raises(StoreVersionError, match="qwend serve"):
        Store.open_for_reading(tmp_path)
    for _ in range(2):
        open_store(tmp_path).close()
    reopened = Store.open_for_reading(tmp_path)
    assert reopened is not None
    with reopened.reading() as reader:
        assert dict(reader.records("states")) == {STATE: b"header"}
        (use,), (name,) = reader.records("uses"), reader.records("models")
        assert (decode_use(*use), decode_model(*name)) == (USE, "tïny")
    reopened.close()


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=1) as env, env.begin(write=True) as txn:
        txn.put(b"theirs", b"1")
    before = (tmp_path / DATA_FILE).read_bytes()
    for open_ in (open_store, Store.open_for_reading):
        with pytest.raises(StoreError, match="not checkpoints of qwend"):
            open_(tmp_path)
    assert (tmp_path / DATA_FILE).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not LMDB" * 4096], ids=["empty", "noise"])
def test_files_that_are_no_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATA_FILE).write_bytes(content)
    if not content:  # LMDB makes an empty file its own; there is nothing to lose
        open_store(tmp_path).close()
        return
    for open_ in (open_store, Store.open_for_reading):
        with pytest.raises(StoreError, match="cannot be used"):
            open_(tmp_path)


def test_an_empty_file_read_only(tmp_path: Path) -> None:
    (tmp_path / DATA_FILE).touch()
    with pytest.raises(StoreError):
        Store.open_for_reading(tmp_path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    """LMDB itself would die of a bus error."""
    store = open_store(tmp_path)
    store.write(WriteBatch(put_pages=[(PAGE, b"header", bytes(1 << 20))]))
    store.close()
    os.truncate(tmp_path / DATA_FILE, 5 * 4096)
    for open_ in (open_store, Store.open_for_reading):
        with pytest.raises(StoreError, match="cut short"):
            open_(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Root may write anywhere but not in /proc."""
    with pytest.raises(ConfigError):
        open_store(Path("/proc/qwend"))
    (tmp_path / "writer.lock").mkdir()
    with pytest.raises(ConfigError, match="Cannot write in"):
        open_store(tmp_path)


def test_footprint_covers_what_lmdb_takes(tmp_path: Path) -> None:
    store = open_store(tmp_path, 64 << 20)
    sizes = [700, 5000, 70_000, CHUNK_BYTES, CHUNK_BYTES + 1] * 20
    records = [(bytes([n]) + b"p" * 23, bytes(368), bytes(size)) for n, size in enumerate(sizes)]
    empty = store.file_bytes()
    store.write(WriteBatch(put_pages=records))
    used = (tmp_path / DATA_FILE).stat().st_size - empty
    assert used * 0.8 < sum(map(footprint, sizes)) < used * 1.25
    store.close()
