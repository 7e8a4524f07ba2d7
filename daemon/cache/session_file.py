"""A session as one file, to be taken to another machine: its format, written and read.

Owns the bytes; README.md has the same as tables. Nothing of a file is believed before its checksum
has been compared. Any thread.

    head     magic "qwSX" · file version u16 · record version u16 · fingerprint 16 ·
             created_us u64 · model bytes u16 · session bytes u16 · title bytes u16 · 0 u16 ·
             model, session, title utf-8 · checksum u64
    record   kind u8 ("P" page, "S" state) · 0 3 · header bytes u32 · header · payload
    end      magic "qwSZ" · xxh3-128 of all bytes before it

Headers are those of the store, and hold the payload's length and checksum. A state comes after all
of its pages.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import xxhash
from msgspec import Struct

from daemon.cache.record_source import RecordSource
from daemon.cache.records import (
    RECORD_VERSION,
    DamagedRecord,
    PageHeader,
    StateHeader,
    checksum,
    decode_page,
    decode_state,
    encode_page,
    encode_state,
    sealed,
)
from daemon.cache.shelf import Branch
from daemon.checkpoint import HostBytes
from daemon.errors import SessionFileError

FILE_VERSION = 1
_HEAD = struct.Struct("<4sHH16sQHHHH")
_RECORD = struct.Struct("<c3xI")
_SUM_BYTES = 8
_DIGEST_BYTES = 16
_END_BYTES = 4 + _DIGEST_BYTES
_READ_BYTES = 1 << 20
_MAX_HEADER_BYTES = 4096


class SessionHead(Struct, frozen=True, kw_only=True):
    """Whose states a file holds, and for which model; the strings are for people."""

    fingerprint: bytes
    model: str
    session: str
    title: str
    created_us: int


class Checkpoint(Struct, frozen=True):
    """A state with those of its pages that came with no state before it, as (header, payload)."""

    state: tuple[StateHeader, bytes]
    pages: tuple[tuple[PageHeader, bytes], ...]


# ── writing ───────────────────────────────────────────────────────────────────────────────────


def session_bytes(
    head: SessionHead,
    branches: Sequence[Branch],
    records: RecordSource,
    drop: Callable[[bytes, DamagedRecord], None],
) -> Iterator[bytes]:
    """The file, piece by piece.

    Args:
        drop: told the key of a state that proved damaged, or one of its pages did.

    Raises:
        SessionFileError: a record of the store is damaged; the file ends early then, and nobody
            will take it in.
    """
    digest = xxhash.xxh3_128()
    try:
        for piece in _content(head, branches, records, drop):
            digest.update(piece)
            yield piece
    except DamagedRecord as error:
        raise SessionFileError(f"The session cannot be exported: the store has {error}.") from error
    digest.update(b"qwSZ")
    yield b"qwSZ" + digest.digest()


def _content(
    head: SessionHead,
    branches: Iterable[Branch],
    records: RecordSource,
    drop: Callable[[bytes, DamagedRecord], None],
) -> Iterator[bytes]:
    yield _encode_head(head)
    written: set[bytes] = set()
    for branch in branches:
        try:
            yield from _checkpoint(branch, written, records)
        except DamagedRecord as error:
            drop(branch.state.key, error)
            raise


def _checkpoint(branch: Branch, written: set[bytes], records: RecordSource) -> Iterator[bytes]:
    """A state after those of its pages that are not written yet."""
    for key in branch.chain:
        if key in written:
            continue
        written.add(key)
        page, payload = records.page(key)
        yield from _record(b"P", encode_page(page), payload)
    state, payload = records.state(branch.state.key)
    yield from _record(b"S", encode_state(state), payload)


def _record(kind: bytes, header: bytes, payload: HostBytes) -> Iterator[bytes]:
    yield _RECORD.pack(kind, len(header)) + header
    yield bytes(payload)


def _encode_head(head: SessionHead) -> bytes:
    texts = [text.encode() for text in (head.model, head.session, head.title)]
    fields = _HEAD.pack(
        b"qwSX",
        FILE_VERSION,
        RECORD_VERSION,
        head.fingerprint,
        head.created_us,
        *map(len, texts),
        0,
    )
    return sealed(fields + b"".join(texts))


# ── reading ───────────────────────────────────────────────────────────────────────────────────


class SessionFile:
    """An exported session, read; a context manager.

    Raises:
        SessionFileError: it is no exported session, of another version, or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise SessionFileError(f"{path}: {error.strerror}.") from error
        try:
            self._end = path.stat().st_size - _END_BYTES
            self.head = _read_head(self._file)
            self._check_digest()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SessionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def checkpoints(self, session: str) -> Iterator[Checkpoint]:
        """What it holds, in an order in which it can be stored, under a session's name.

        Raises:
            SessionFileError: a record is not what its header says.
        """
        pages: list[tuple[PageHeader, bytes]] = []
        while self._file.tell() < self._end:
            kind, size = _RECORD.unpack(self._read(_RECORD.size))
            header = self._read(min(size, _MAX_HEADER_BYTES))
            try:
                if kind == b"P":
                    page = decode_page(header[8:32], header)
                    pages.append((page, self._payload(page)))
                else:
                    state = decode_state(header[8:24] + header[6:7], header)
                    named = msgspec.structs.replace(state, session=session)
                    yield Checkpoint((named, self._payload(state)), tuple(pages))
                    pages = []
            except DamagedRecord as error:
                raise SessionFileError(f"The session file holds {error}.") from error

    def _payload(self, header: PageHeader | StateHeader) -> bytes:
        payload = self._read(header.payload_bytes)
        if checksum(payload) != header.payload_sum:
            raise DamagedRecord("a payload whose checksum does not match")
        if header.fingerprint != self.head.fingerprint:
            raise DamagedRecord("a record of another model")
        return payload

    def _read(self, size: int) -> bytes:
        content = self._file.read(min(size, max(self._end - self._file.tell(), 0)))
        if len(content) != size:
            raise SessionFileError("The session file is cut short.")
        return content

    def _check_digest(self) -> None:
        start = self._file.tell()
        self._file.seek(0)
        digest, left = xxhash.xxh3_128(), max(self._end, 0) + 4
        last = b""
        while left > 0 and (piece := self._file.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
            last = (last + piece)[-4:]
        if last != b"qwSZ" or self._file.read() != digest.digest():
            raise SessionFileError("The session file is damaged or cut short; export it again.")
        self._file.seek(start)


def _read_head(file: BinaryIO) -> SessionHead:
    fields = file.read(_HEAD.size)
    if len(fields) < _HEAD.size or fields[:4] != b"qwSX":
        raise SessionFileError("This is no session that qwend exported.")
    _, version, format_version, fingerprint, created_us, *lengths, _ = _HEAD.unpack(fields)
    if (version, format_version) != (FILE_VERSION, RECORD_VERSION):
        raise SessionFileError(
            f"The session file has version {version}.{format_version}, this qwend reads "
            f"{FILE_VERSION}.{RECORD_VERSION}. Export it again with the same qwend."
        )
    rest = file.read(sum(lengths) + _SUM_BYTES)
    try:
        content = _unsealed_head(fields + rest)
    except DamagedRecord as error:
        raise SessionFileError("The session file's head is damaged; export it again.") from error
    texts, start = [], _HEAD.size
    for length in lengths:
        texts.append(content[start : start + length].decode(errors="replace"))
        start += length
    model, session, title = texts
    return SessionHead(
        fingerprint=fingerprint, model=model, session=session, title=title, created_us=created_us
    )


def _unsealed_head(record: bytes) -> bytes:
    content, seal = record[:-_SUM_BYTES], record[-_SUM_BYTES:]
    if checksum(content).to_bytes(_SUM_BYTES, "little") != seal:
        raise DamagedRecord("a head whose checksum does not match")
    return content
