"""The on-disk format, field by field; README.md has the same as tables with offsets.

Owns the bytes of headers, their version and their checksums; no LMDB, no files, no thread. Payloads
are opaque. A header carries its own key and its payload's checksum, and ends in a checksum over
all bytes before it (xxh3-64). All numbers are little-endian.

    page     magic "qwKV" · version u16 · 0 u16 · hash 16 · variant 8 · parent hash 16 ·
             parent variant 8 · fingerprint 16 · index u32 · tokens u32 · created_us u64 ·
             payload bytes u64 · payload xxh3 u64 · token ids 64 × u32 · checksum u64
    state    magic "qwST" · version u16 · birth u8 · reason u8 · hash 16 · variant 8 ·
             fingerprint 16 · position u64 · grid pages u32 · session bytes u32 · created_us u64 ·
             payload bytes u64 · payload xxh3 u64 · session utf-8 · checksum u64
    sampled  magic "qwSR" · version u16 · 0 u16 · hash 16 · fingerprint 16 · text bytes u64 ·
             text xxh3 u64 · created_us u64 · tokens u32 · 0 u32 · token ids × u32 · checksum u64
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import xxhash
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth, HostBytes, Reason

FORMAT_VERSION = 3
"""Of the store: its tables, and what they hold."""

LAST_BARE_VERSION = 2
"""Of stores up to it, `uses`, `models` and the version itself have no checksum."""

RECORD_VERSION = 2
"""Of the records that begin with a magic: it stands in each, in exported sessions too."""

HASH_BYTES = 16
VARIANT_BYTES = 8
PAGE_KEY_BYTES = HASH_BYTES + VARIANT_BYTES
MAX_SESSION_BYTES = 256

ON_GRID = bytes(VARIANT_BYTES)
"""The variant of pages that prompt evaluation computed on the grid; others name their run."""

NO_PARENT = bytes(PAGE_KEY_BYTES)
"""The parent of a sequence's first page."""

_PAGE = struct.Struct("<4sHH16s8s16s8s16sIIQQQ256s")
_STATE = struct.Struct("<4sHBB16s8s16sQIIQQQ")
_SAMPLED = struct.Struct("<4sHH16s16sQQQII")
_USE = struct.Struct("<Qd")
_VERSION_BYTES = 4
_SUM = struct.Struct("<Q")
_BIRTH_CODES: dict[Birth, int] = {"prompt": 0, "decode": 1}
_REASON_CODES: dict[Reason, int] = {
    "system": 1, "user": 2, "prompt": 3, "interval": 4, "reply": 5,
    "tool": 6, "mark": 7, "junction": 8, "interrupted": 9, "section": 10,
    "head": 11,
}  # fmt: skip
_BIRTHS = {code: birth for birth, code in _BIRTH_CODES.items()}
_REASONS = {code: reason for reason, code in _REASON_CODES.items()}


MAX_HEAT = 1e9
"""More uses than this are none that were counted."""


class DamagedRecord(Exception):
    """Bytes of the store that are not what was written. Never leaves cache/."""


class PageHeader(Struct, frozen=True, kw_only=True):
    """What is known of a KV page beside its payload. `parent` is the key of the page before it."""

    hash: bytes
    variant: bytes
    parent: bytes
    fingerprint: bytes
    index: int
    tokens: bytes
    created_us: int
    payload_bytes: int
    payload_sum: int = 0

    @property
    def key(self) -> bytes:
        """Hash and variant, 24 bytes."""
        return self.hash + self.variant


class StateHeader(Struct, frozen=True, kw_only=True):
    """What is known of a state beside its payload. `variant` is that of its last page."""

    hash: bytes
    born: Birth
    reason: Reason
    variant: bytes
    fingerprint: bytes
    position: int
    num_grid_pages: int
    session: str
    created_us: int
    payload_bytes: int
    payload_sum: int = 0

    @property
    def key(self) -> bytes:
        """Hash and birth, 17 bytes."""
        return state_key(self.hash, self.born)

    @property
    def tip(self) -> bytes:
        """The key of its last page."""
        return self.hash + self.variant

    @property
    def num_pages(self) -> int:
        """Pages that it needs."""
        return self.position // PAGE_TOKENS


class SampledReply(Struct, frozen=True, kw_only=True):
    """The tokens that were sampled for a piece of text, which is kept as hash and length only."""

    hash: bytes
    fingerprint: bytes
    text_bytes: int
    text_sum: int
    created_us: int
    tokens: tuple[int, ...]


class Use(Struct, frozen=True, kw_only=True):
    """When a state was last saved or restored, and how often, older uses counting for less."""

    used_us: int
    heat: float = 1.0


Header = TypeVar("Header", PageHeader, StateHeader)


def state_key(hash: bytes, born: Birth) -> bytes:
    """The key of a state, 17 bytes."""
    return hash + bytes((_BIRTH_CODES[born],))


def checksum(content: HostBytes) -> int:
    """xxh3-64."""
    return xxhash.xxh3_64_intdigest(content)


def with_sum(header: Header, payload: HostBytes) -> Header:
    """The header with its payload's checksum."""
    return msgspec.structs.replace(header, payload_sum=checksum(payload))


def encode_page(page: PageHeader) -> bytes:
    """A page's header as bytes."""
    fields = _PAGE.pack(
        b"qwKV",
        RECORD_VERSION,
        0,
        page.hash,
        page.variant,
        page.parent[:HASH_BYTES],
        page.parent[HASH_BYTES:],
        page.fingerprint,
        page.index,
        PAGE_TOKENS,
        page.created_us,
        page.payload_bytes,
        page.payload_sum,
        page.tokens,
    )
    return sealed(fields)


def decode_page(key: bytes, record: HostBytes) -> PageHeader:
    """Read a page's header.

    Raises:
        DamagedRecord: it is not whole, or belongs to another key.
    """
    content = unsealed(record, b"qwKV", _PAGE.size)
    _, _, _, hash, variant, parent, parent_variant, print_, index, _, *rest = _PAGE.unpack(content)
    created_us, payload_bytes, payload_sum, tokens = rest
    if hash + variant != key:
        raise DamagedRecord("a page under another page's key")
    return PageHeader(
        hash=hash,
        variant=variant,
        parent=parent + parent_variant,
        fingerprint=print_,
        index=index,
        tokens=tokens,
        created_us=created_us,
        payload_bytes=payload_bytes,
        payload_sum=payload_sum,
    )


def encode_state(state: StateHeader) -> bytes:
    """A state's header as bytes."""
    session = state.session.encode()
    assert len(session) <= MAX_SESSION_BYTES
    fields = _STATE.pack(
        b"qwST",
        RECORD_VERSION,
        _BIRTH_CODES[state.born],
        _REASON_CODES[state.reason],
        state.hash,
        state.variant,
        state.fingerprint,
        state.position,
        state.num_grid_pages,
        len(session),
        state.created_us,
        state.payload_bytes,
        state.payload_sum,
    )
    return sealed(fields + session)


def decode_state(key: bytes, record: HostBytes) -> StateHeader:
    """Read a state's header.

    Raises:
        DamagedRecord: it is not whole, or belongs to another key.
    """
    content = unsealed(record, b"qwST", _STATE.size)
    _, _, born, reason, hash, variant, print_, position, num_grid_pages, session_bytes, *rest = (
        _STATE.unpack_from(content)
    )
    created_us, payload_bytes, payload_sum = rest
    session = content[_STATE.size :]
    if born not in _BIRTHS or reason not in _REASONS or len(session) != session_bytes:
        raise DamagedRecord("a state with unknown fields")
    state = StateHeader(
        hash=hash,
        born=_BIRTHS[born],
        reason=_REASONS[reason],
        variant=variant,
        fingerprint=print_,
        position=position,
        num_grid_pages=num_grid_pages,
        session=session.decode(errors="replace"),
        created_us=created_us,
        payload_bytes=payload_bytes,
        payload_sum=payload_sum,
    )
    if state.key != key:
        raise DamagedRecord("a state under another state's key")
    return state


def encode_sampled(reply: SampledReply) -> bytes:
    """A sampled reply as bytes."""
    fields = _SAMPLED.pack(
        b"qwSR",
        RECORD_VERSION,
        0,
        reply.hash,
        reply.fingerprint,
        reply.text_bytes,
        reply.text_sum,
        reply.created_us,
        len(reply.tokens),
        0,
    )
    return sealed(fields + _token_bytes(reply.tokens))


def decode_sampled(key: bytes, record: HostBytes) -> SampledReply:
    """Read a sampled reply.

    Raises:
        DamagedRecord: it is not whole, or belongs to another key.
    """
    content = unsealed(record, b"qwSR", _SAMPLED.size)
    _, _, _, hash, print_, text_bytes, text_sum, created_us, num_tokens, _ = _SAMPLED.unpack_from(
        content
    )
    tokens = _tokens(content[_SAMPLED.size :])
    if hash != key or len(tokens) != num_tokens:
        raise DamagedRecord("a sampled reply with another key or length")
    return SampledReply(
        hash=hash,
        fingerprint=print_,
        text_bytes=text_bytes,
        text_sum=text_sum,
        created_us=created_us,
        tokens=tokens,
    )


def sampled_bytes(record: bytes) -> bytes:
    """The token ids of a sampled reply's record, little-endian u32."""
    return record[_SAMPLED.size : -_SUM.size]


def encode_use(key: bytes, use: Use) -> bytes:
    """A use as bytes."""
    return bound(key, _USE.pack(use.used_us, use.heat))


def decode_use(key: bytes, record: bytes) -> Use:
    """Read a use.

    Raises:
        DamagedRecord: it is not whole, belongs to another key, or makes no sense.
    """
    content = _unbound(key, record)
    used_us, heat = _USE.unpack(content) if len(content) == _USE.size else (0, 0.0)
    if not 0.0 < heat < MAX_HEAT:
        raise DamagedRecord("a use that nobody counted")
    return Use(used_us=used_us, heat=heat)


def encode_model(fingerprint: bytes, name: str) -> bytes:
    """A model's name as bytes."""
    return bound(fingerprint, name.encode(errors="replace"))


def decode_model(fingerprint: bytes, record: bytes) -> str:
    """Read a model's name.

    Raises:
        DamagedRecord: it is not whole, or belongs to another key.
    """
    return _unbound(fingerprint, record).decode(errors="replace")


def encode_version(key: bytes, version: int) -> bytes:
    """The store's version as bytes."""
    return bound(key, version.to_bytes(_VERSION_BYTES, "little"))


def decode_version(key: bytes, record: bytes) -> int:
    """Read the store's version.

    Raises:
        DamagedRecord: it is not whole.
    """
    is_bare = len(record) == _VERSION_BYTES
    version = int.from_bytes(record if is_bare else _unbound(key, record), "little")
    if is_bare and version > LAST_BARE_VERSION:
        raise DamagedRecord("a version without a checksum")
    return version


def bound(key: bytes, content: bytes) -> bytes:
    """A record with a checksum over its key and itself."""
    return content + _SUM.pack(checksum(key + content))


def _unbound(key: bytes, record: bytes) -> bytes:
    content, seal = record[: -_SUM.size], record[-_SUM.size :]
    if _SUM.pack(checksum(key + content)) != seal:
        raise DamagedRecord("a record whose checksum does not match")
    return content


def sealed(content: bytes) -> bytes:
    """A record with its checksum."""
    return content + _SUM.pack(checksum(content))


def unsealed(record: HostBytes, magic: bytes, min_bytes: int) -> bytes:
    """A record without its checksum.

    Raises:
        DamagedRecord: it is not whole, or of another kind or version.
    """
    record = bytes(record)
    content, seal = record[: -_SUM.size], record[-_SUM.size :]
    if len(content) < min_bytes or _SUM.pack(checksum(content)) != seal:
        raise DamagedRecord("a record whose checksum does not match")
    if content[:4] != magic or int.from_bytes(content[4:6], "little") != RECORD_VERSION:
        raise DamagedRecord("a record of another kind or version")
    return content


def _token_bytes(tokens: Sequence[int]) -> bytes:
    numbers = array("I", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _tokens(content: bytes) -> tuple[int, ...]:
    if len(content) % 4:
        raise DamagedRecord("token ids that are not whole")
    numbers = array("I", content)
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)
