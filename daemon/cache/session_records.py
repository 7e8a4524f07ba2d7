"""What people say of sessions, as records: titles, pins, and where one was forked from another.

Owns their format; README.md has the same as a table. No LMDB and no thread. A record ends in a
checksum over all bytes before it (xxh3-64); all numbers are little-endian.

    magic "qwSE" · version u16 · flags u8 (1: pinned, 2: has a state, 4: wiped) · 0 u8 ·
    fingerprint 16 · key of a state 17 · 0 7 · when created or wiped, us u64 · session bytes u16 ·
    title bytes u16 · parent bytes u16 · 0 u16 · session, title, parent utf-8 · checksum u64
"""

import struct

import xxhash
from msgspec import Struct

from daemon.cache.records import (
    HASH_BYTES,
    MAX_SESSION_BYTES,
    RECORD_VERSION,
    DamagedRecord,
    sealed,
    unsealed,
)
from daemon.checkpoint import HostBytes

STATE_KEY_BYTES = HASH_BYTES + 1
_FIELDS = struct.Struct("<4sHBB16s17s7sQHHHH")
_PINNED, _HAS_STATE, _WIPED = 1, 2, 4


class SessionRecord(Struct, frozen=True, kw_only=True):
    """`state_key` names a checkpoint that belongs to the session without having been saved under
    its name (a fork's, an imported one's); b"" when there is none. `parent` is the session that it
    was forked from. `wiped_us`: checkpoints of its name from before then are no longer its own, but
    those of forks. Strings are at most 256 bytes of utf-8."""

    fingerprint: bytes
    session: str
    title: str = ""
    is_pinned: bool = False
    parent: str = ""
    state_key: bytes = b""
    created_us: int = 0
    wiped_us: int = 0

    @property
    def key(self) -> bytes:
        """The record's key, 16 bytes."""
        return session_key(self.fingerprint, self.session)


def session_key(fingerprint: bytes, session: str) -> bytes:
    """xxh3-128 of the model's fingerprint and the session's name."""
    return xxhash.xxh3_128_digest(fingerprint + session.encode(errors="replace"))


def session_id(fingerprint: bytes, session: str) -> str:
    """A session's name for URLs and command lines: 16 hexadecimal digits of its key."""
    return session_key(fingerprint, session)[:8].hex()


def clipped(text: str) -> str:
    """As much of a text as a record holds; half a character at the cut, and lone surrogates, go."""
    return text.encode(errors="ignore")[:MAX_SESSION_BYTES].decode(errors="ignore")


def encode_session(record: SessionRecord) -> bytes:
    """A record as bytes."""
    texts = [text.encode() for text in (record.session, record.title, record.parent)]
    assert max(map(len, texts)) <= MAX_SESSION_BYTES
    flags = (
        _PINNED * record.is_pinned
        | _HAS_STATE * bool(record.state_key)
        | _WIPED * bool(record.wiped_us)
    )
    fields = _FIELDS.pack(
        b"qwSE",
        RECORD_VERSION,
        flags,
        0,
        record.fingerprint,
        record.state_key or bytes(STATE_KEY_BYTES),
        bytes(7),
        record.wiped_us or record.created_us,
        *map(len, texts),
        0,
    )
    return sealed(fields + b"".join(texts))


def decode_session(key: bytes, record: HostBytes) -> SessionRecord:
    """Read a record.

    Raises:
        DamagedRecord: it is not whole, or belongs to another key.
    """
    content = unsealed(record, b"qwSE", _FIELDS.size)
    _, _, flags, _, fingerprint, state_key, _, created_us, *lengths, _ = _FIELDS.unpack_from(
        content
    )
    texts, start = [], _FIELDS.size
    for length in lengths:
        texts.append(content[start : start + length].decode(errors="replace"))
        start += length
    found = SessionRecord(
        fingerprint=fingerprint,
        session=texts[0],
        title=texts[1],
        is_pinned=bool(flags & _PINNED),
        parent=texts[2],
        state_key=state_key if flags & _HAS_STATE else b"",
        created_us=created_us,
        wiped_us=created_us if flags & _WIPED else 0,
    )
    if start != len(content) or found.key != key:
        raise DamagedRecord("a session under another key or of another length")
    return found
