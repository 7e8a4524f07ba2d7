"""Reads one checkpoint back and believes nothing: keys, links, token ids, lengths, checksums.

Owns the verification of a restore. Runs on a reading thread; what it finds wrong it names, and
`transfer` drops it.
"""

from collections.abc import Mapping
from concurrent.futures import Future, wait

from msgspec import Struct

from daemon.cache.copier import Copier
from daemon.cache.prefix_hash import TOKEN_BYTES
from daemon.cache.records import (
    NO_PARENT,
    DamagedRecord,
    PageHeader,
    StateHeader,
    checksum,
    decode_page,
    decode_state,
)
from daemon.cache.store import Reader
from daemon.checkpoint import PAGE_TOKENS, HostBytes, Snapshot

_PAGE_TOKEN_BYTES = PAGE_TOKENS * TOKEN_BYTES


class DamagedPage(DamagedRecord):
    """A page that is not what its key promises, and its key."""

    def __init__(self, key: bytes, what: str) -> None:
        super().__init__(what)
        self.key = key


class Wanted(Struct, frozen=True):
    """A checkpoint to read: what the index says of it, and what it must turn out to be.

    `chain` are the keys of its pages, `tokens` the token ids of its prefix (little-endian u32);
    `at_hand` are payloads, by key of page or state, that are in memory.
    """

    state: StateHeader
    chain: tuple[bytes, ...]
    tokens: bytes
    at_hand: Mapping[bytes, HostBytes]


def read_checkpoint(reader: Reader, wanted: Wanted, copier: Copier) -> Snapshot:
    """Read and verify a state and all its pages; their payloads are copied all at once.

    Raises:
        DamagedPage: a page is missing or wrong.
        DamagedRecord: the state is missing or wrong.
    """
    state = wanted.state
    if len(wanted.chain) != state.num_pages or len(wanted.tokens) != state.position * 4:
        raise DamagedRecord("a state whose position is not that of its pages")
    pages: list[_Copy] = []
    content: _Copy = None
    try:
        content = _begin_state(reader, wanted, copier)
        pages += [_begin_page(reader, wanted, i, copier) for i in range(len(wanted.chain))]
    finally:
        # Whoever fails must not close the view under the copies that have begun.
        wait([copy for copy in (content, *pages) if isinstance(copy, Future)])
    if (kept := _payload(content)) is None:
        raise DamagedRecord("a state whose checksum does not match")
    payloads: dict[int, HostBytes] = {}
    for index, copy in enumerate(pages):
        if (payload := _payload(copy)) is None:
            raise DamagedPage(wanted.chain[index], "a page whose checksum does not match")
        payloads[index] = payload
    return Snapshot(state.position, state.born, state.num_grid_pages, kept, payloads)


_Copy = HostBytes | Future[HostBytes | None] | None
"""A payload that is here, or one that is being copied; None when it is damaged."""


def _payload(copy: _Copy) -> HostBytes | None:
    return copy.result() if isinstance(copy, Future) else copy


def _begin_state(reader: Reader, wanted: Wanted, copier: Copier) -> _Copy:
    key = wanted.state.key
    if key in wanted.at_hand:
        return wanted.at_hand[key]
    header = _state_header(reader, key)
    if header.tip != wanted.chain[-1] or header.position != wanted.state.position:
        raise DamagedRecord("a state of another position or other pages")
    if header.fingerprint != wanted.state.fingerprint:
        raise DamagedRecord("a state of another model")
    return copier.copy(reader.chunks("states", key, header.payload_bytes), header.payload_sum)


def _begin_page(reader: Reader, wanted: Wanted, index: int, copier: Copier) -> _Copy:
    key = wanted.chain[index]
    if key in wanted.at_hand:
        return wanted.at_hand[key]
    header = _page_header(reader, key)
    start = index * _PAGE_TOKEN_BYTES
    if header.tokens != wanted.tokens[start : start + _PAGE_TOKEN_BYTES]:
        raise DamagedPage(key, "a page of other tokens")
    if header.index != index or header.parent != (wanted.chain[index - 1] if index else NO_PARENT):
        raise DamagedPage(key, "a page of another place")
    if header.fingerprint != wanted.state.fingerprint:
        raise DamagedPage(key, "a page of another model")
    try:
        chunks = reader.chunks("pages", key, header.payload_bytes)
    except DamagedRecord as error:
        raise DamagedPage(key, str(error)) from error
    return copier.copy(chunks, header.payload_sum)


def read_state(reader: Reader, key: bytes) -> tuple[StateHeader, bytes]:
    """A state's header and payload, each sound by itself.

    Raises:
        DamagedRecord: it is missing or wrong.
    """
    header = _state_header(reader, key)
    payload = reader.payload("states", key, header.payload_bytes)
    if checksum(payload) != header.payload_sum:
        raise DamagedRecord("a state whose checksum does not match")
    return header, payload


def read_page(reader: Reader, key: bytes) -> tuple[PageHeader, bytes]:
    """A page's header and payload, each sound by itself.

    Raises:
        DamagedPage: it is missing or wrong.
    """
    header = _page_header(reader, key)
    try:
        payload = reader.payload("pages", key, header.payload_bytes)
    except DamagedRecord as error:
        raise DamagedPage(key, str(error)) from error
    if checksum(payload) != header.payload_sum:
        raise DamagedPage(key, "a page whose checksum does not match")
    return header, payload


def _state_header(reader: Reader, key: bytes) -> StateHeader:
    record = reader.header("states", key)
    if record is None:
        raise DamagedRecord("a state without header")
    return decode_state(key, record)


def _page_header(reader: Reader, key: bytes) -> PageHeader:
    record = reader.header("pages", key)
    if record is None:
        raise DamagedPage(key, "a page without header")
    try:
        return decode_page(key, record)
    except DamagedRecord as error:
        raise DamagedPage(key, str(error)) from error
