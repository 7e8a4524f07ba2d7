"""The LMDB environment: tables, one write transaction a checkpoint, typed failures.

Owns the files of a store's folder. Decides nothing: what is written, kept or deleted comes from
`transfer`. Writing belongs to the transfer thread; reading to any thread, one `Reader` each.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb
from msgspec import Struct

from daemon.cache.records import (
    FORMAT_VERSION,
    LAST_BARE_VERSION,
    DamagedRecord,
    Use,
    bound,
    decode_version,
    encode_model,
    encode_use,
    encode_version,
)
from daemon.cache.writer_lock import WriterLock
from daemon.checkpoint import HostBytes
from daemon.errors import ConfigError, StoreError, StoreFull, StoreVersionError

T = TypeVar("T")

CHUNK_BYTES = (256 << 10) - 16
"""Payloads are cut into values of one size, so that the space of a deleted one fits the next.

With LMDB's own 16 bytes a chunk fills 64 pages of 4 KiB exactly.
"""

MIN_MAP_BYTES = 4 << 20
DATA_FILE = "data.mdb"
LOCK_FILE = "writer.lock"
VERSION_KEY = b"version"
_OS_PAGE_BYTES = 4096
_NUMBER_BYTES = 4
_RECORD_BYTES = 512  # header, keys and their share of the B-tree
_PAYLOADS = {"pages": "page_payloads", "states": "state_payloads"}
_TABLES = ("meta", "pages", "states", *_PAYLOADS.values(), "uses", "sampled", "models")
_LATER_TABLES = ("sessions", "writes")
"""Tables that a store may be without: a writer makes them, a reader takes them for empty."""

_BARE_TABLES = ("uses", "models")
"""Tables whose records had no checksum up to `LAST_BARE_VERSION`."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteBatch(Struct, frozen=True, kw_only=True):
    """What one transaction does: deletions first, then records. Keys and headers are bytes.

    `pages` and `states` are deleted with their payloads; `put_*` are (key, header, payload).
    `uses` are by state key, `models` names by fingerprint. In these and the other `put_*`, by key,
    None is deleted.
    """

    delete_pages: Sequence[bytes] = ()
    delete_states: Sequence[bytes] = ()
    put_pages: Sequence[tuple[bytes, bytes, HostBytes]] = ()
    put_state: tuple[bytes, bytes, HostBytes] | None = None
    uses: Mapping[bytes, Use | None] = {}
    put_sampled: Mapping[bytes, bytes | None] = {}
    put_sessions: Mapping[bytes, bytes | None] = {}
    put_writes: Mapping[bytes, bytes | None] = {}
    put_meta: Mapping[bytes, bytes | None] = {}
    models: Mapping[bytes, str | None] = {}


class Reader:
    """One consistent view of the store, from one read transaction."""

    def __init__(self, txn: Any, tables: Mapping[str, Any]) -> None:
        self._txn = txn
        self._tables = tables

    def header(self, table: str, key: bytes) -> bytes | None:
        """A record's header, from "pages" or "states"; None when there is none."""
        value = self._txn.get(key, db=self._tables[table])
        return None if value is None else bytes(value)

    def records(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """All (key, record) of a table, in key order: of "pages" and "states" the headers."""
        if table not in self._tables:
            return
        for key, value in self._txn.cursor(self._tables[table]):
            yield bytes(key), bytes(value)

    @staticmethod
    def payload_table(table: str) -> str:
        """Where the payloads of "pages" or "states" lie."""
        return _PAYLOADS[table]

    def payload_keys(self, table: str) -> set[bytes]:
        """The keys of "pages" or "states" for which there are payloads; reads none."""
        with self._txn.cursor(self._tables[_PAYLOADS[table]]) as chunks:
            return {bytes(key[:-_NUMBER_BYTES]) for key in chunks.iternext(values=False)}

    def payload(self, table: str, key: bytes, num_bytes: int) -> bytes:
        """The payload of a record in "pages" or "states", copied once.

        Raises:
            DamagedRecord: a chunk is missing or has another length.
        """
        return b"".join(self.chunks(table, key, num_bytes))

    def chunks(self, table: str, key: bytes, num_bytes: int) -> list[memoryview]:
        """The payload in pieces as they lie in the file, while this view is open.

        Raises:
            DamagedRecord: as `payload`.
        """
        chunks = []
        for number, start in enumerate(range(0, num_bytes, CHUNK_BYTES)):
            chunk = self._txn.get(_chunk_key(key, number), db=self._tables[_PAYLOADS[table]])
            if chunk is None or len(chunk) != min(CHUNK_BYTES, num_bytes - start):
                raise DamagedRecord("a payload with a missing chunk")
            chunks.append(chunk)
        return chunks


class Store:
    """A folder of checkpoints. Make one with `open_for_writing` or `open_for_reading`."""

    def __init__(self, path: Path, env: Any, lock: WriterLock | None) -> None:
        self.path = path
        self._env = env
        self._lock = lock
        self._tables: dict[str, Any] = {}

    @classmethod
    def open_for_writing(cls, path: Path, max_bytes: int) -> "Store":
        """Open or make a store that never takes more than `max_bytes` of disk (4 MiB at least).

        Raises:
            ConfigError: the folder cannot be made or written.
            StoreInUse: another process writes there.
            StoreVersionError: another format version wrote it.
            StoreError: the files are not a sound store.
        """
        try:
            # What was said to the model is nobody else's business.
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Cannot make the folder {path}: {error.strerror}.") from error
        lock = WriterLock(path / LOCK_FILE)
        map_bytes = max(max_bytes, MIN_MAP_BYTES) // _OS_PAGE_BYTES * _OS_PAGE_BYTES
        try:
            # Without metasync a power failure may cost the last checkpoint, never an earlier one.
            store = cls(path, _environment(path, map_size=map_bytes, metasync=False), lock)
            store._open_tables(create=True)
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def open_for_reading(cls, path: Path) -> "Store | None":
        """Open a store beside a running daemon or without one; None when there is none.

        Raises:
            ConfigError, StoreVersionError, StoreError: as `open_for_writing`.
        """
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is not a folder.")
        if not (path / DATA_FILE).exists():
            return None
        # Size 0: LMDB takes the map's size from the file.
        store = cls(path, _environment(path, map_size=0, readonly=True), None)
        store._open_tables(create=False)
        return store

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """One consistent view.

        Raises:
            StoreError: LMDB cannot read.
        """
        with _typed_errors(self.path), self._env.begin(buffers=True) as txn:
            yield Reader(txn, self._tables)

    def write(self, batch: WriteBatch) -> None:
        """Do all of `batch` or nothing.

        Raises:
            StoreFull: neither the map nor the disk has room; nothing changed.
            StoreError: anything else; nothing changed.
        """
        with _typed_errors(self.path), self._env.begin(write=True) as txn:
            for table, keys in (("pages", batch.delete_pages), ("states", batch.delete_states)):
                for key in keys:
                    self._delete(txn, table, key)
            for page in batch.put_pages:
                self._put(txn, "pages", page)
            if batch.put_state is not None:
                self._put(txn, "states", batch.put_state)
            self._put_or_delete(txn, "uses", _encoded(batch.uses, encode_use))
            self._put_or_delete(txn, "sampled", batch.put_sampled)
            self._put_or_delete(txn, "sessions", batch.put_sessions)
            self._put_or_delete(txn, "writes", batch.put_writes)
            self._put_or_delete(txn, "meta", batch.put_meta)
            self._put_or_delete(txn, "models", _encoded(batch.models, encode_model))

    def file_bytes(self) -> int:
        """Bytes that the data file takes on disk."""
        return (self.path / DATA_FILE).stat().st_blocks * 512

    def close(self) -> None:
        """Close the files and let another writer in. No reader may be open."""
        self._env.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open_tables(self, create: bool) -> None:
        try:
            with _typed_errors(self.path):
                self._check_length()
                self._env.reader_check()
                is_new = create and self._env.stat()["entries"] == 0
                if not is_new:
                    self._check_version(may_migrate=create)
                for name in _TABLES:
                    self._tables[name] = self._env.open_db(name.encode(), create=is_new)
                self._open_later_tables(create)
                if create:
                    self._bring_up_to_date()
        except BaseException:
            self._env.close()
            raise

    def _open_later_tables(self, create: bool) -> None:
        for name in _LATER_TABLES:
            try:
                self._tables[name] = self._env.open_db(name.encode(), create=create)
            except lmdb.NotFoundError:
                assert not create

    def _check_length(self) -> None:
        """LMDB trusts its own page numbers: beyond the end of the file lies a bus error."""
        needed = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if (self.path / DATA_FILE).stat().st_size < needed:
            raise StoreError(
                f"The checkpoints in {self.path} are cut short. Delete the folder; it is a cache."
            )

    def _check_version(self, may_migrate: bool) -> None:
        try:
            meta = self._env.open_db(b"meta", create=False)
            with self._env.begin() as txn:
                record = txn.get(VERSION_KEY, db=meta)
        except lmdb.NotFoundError:
            record = None
        if record is None:
            raise StoreError(f"The LMDB files in {self.path} are not checkpoints of qwend.")
        try:
            found = decode_version(VERSION_KEY, record)
        except DamagedRecord as error:
            raise StoreError(
                f"The checkpoints in {self.path} have {error}. Delete the folder; it is a cache."
            ) from error
        if found == LAST_BARE_VERSION and not may_migrate:
            raise StoreVersionError(
                f"The checkpoints in {self.path} are of an older qwend; `qwend serve` with this "
                "folder brings them up to date."
            )
        if found not in (LAST_BARE_VERSION, FORMAT_VERSION):
            raise StoreVersionError(
                f"The checkpoints in {self.path} have format {found}, this qwend writes "
                f"{FORMAT_VERSION}. Delete the folder or choose another with --cache-dir."
            )

    def _bring_up_to_date(self) -> None:
        """Write the version of a new store, and give an older one's records their checksums."""
        version = encode_version(VERSION_KEY, FORMAT_VERSION)
        with self._env.begin(write=True) as txn:
            found = txn.get(VERSION_KEY, db=self._tables["meta"])
            if found == version:
                return
            for table in _BARE_TABLES if found else ():
                for key, content in list(txn.cursor(self._tables[table])):
                    txn.put(key, bound(key, content), db=self._tables[table])
            txn.put(VERSION_KEY, version, db=self._tables["meta"])

    def _put(self, txn: Any, table: str, record: tuple[bytes, bytes, HostBytes]) -> None:
        key, header, payload = record
        txn.put(key, header, db=self._tables[table])
        content = memoryview(payload).cast("B")
        for number, start in enumerate(range(0, len(content), CHUNK_BYTES)):
            chunk = content[start : start + CHUNK_BYTES]
            txn.put(_chunk_key(key, number), chunk, db=self._tables[_PAYLOADS[table]])

    def _put_or_delete(self, txn: Any, table: str, records: Mapping[bytes, bytes | None]) -> None:
        for key, record in records.items():
            if record is None:
                txn.delete(key, db=self._tables[table])
            else:
                txn.put(key, record, db=self._tables[table])

    def _delete(self, txn: Any, table: str, key: bytes) -> None:
        txn.delete(key, db=self._tables[table])
        if table == "states":
            txn.delete(key, db=self._tables["uses"])
        with txn.cursor(self._tables[_PAYLOADS[table]]) as chunks:
            found = chunks.set_range(key)
            while found and bytes(chunks.key()).startswith(key):
                found = chunks.delete()


def footprint(payload_bytes: int) -> int:
    """Bytes of disk that a record takes with a payload of this size."""
    whole, rest = divmod(payload_bytes, CHUNK_BYTES)
    rest_pages = -(-(rest + 16) // _OS_PAGE_BYTES) if rest else 0
    return _RECORD_BYTES + whole * (CHUNK_BYTES + 16) + rest_pages * _OS_PAGE_BYTES


def _encoded(
    changes: Mapping[bytes, T | None], encode: Callable[[bytes, T], bytes]
) -> dict[bytes, bytes | None]:
    return {key: None if change is None else encode(key, change) for key, change in changes.items()}


def _chunk_key(key: bytes, number: int) -> bytes:
    return key + number.to_bytes(_NUMBER_BYTES, "big")


def _environment(path: Path, **options: Any) -> Any:
    with _typed_errors(path):
        return lmdb.open(
            str(path), mode=0o600, max_dbs=len(_TABLES) + len(_LATER_TABLES), **options
        )


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFull(f"The checkpoints in {path} fill their budget.") from error
    except lmdb.Error as error:
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            raise StoreFull(f"The disk of {path} is full.") from error
        raise StoreError(f"The checkpoints in {path} cannot be used: {error}.") from error
