from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.cache import records
from daemon.cache.records import (
    NO_PARENT,
    ON_GRID,
    DamagedRecord,
    PageHeader,
    SampledReply,
    StateHeader,
    decode_page,
    decode_sampled,
    decode_state,
    encode_page,
    encode_sampled,
    encode_state,
)
from daemon.cache.session_records import SessionRecord, decode_session, encode_session

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
HASH = st.binary(min_size=16, max_size=16)
VARIANT = st.binary(min_size=8, max_size=8)

PAGES = st.builds(
    PageHeader,
    hash=HASH,
    variant=VARIANT,
    parent=st.binary(min_size=24, max_size=24),
    fingerprint=HASH,
    index=U32,
    tokens=st.binary(min_size=256, max_size=256),
    created_us=U64,
    payload_bytes=U64,
    payload_sum=U64,
)
STATES = st.builds(
    StateHeader,
    hash=HASH,
    born=st.sampled_from(["prompt", "decode"]),
    reason=st.sampled_from(["system", "user", "prompt", "interval", "reply"]),
    variant=VARIANT,
    fingerprint=HASH,
    position=U64,
    num_grid_pages=U32,
    session=st.text(st.characters(exclude_categories=["Cs"]), max_size=64),
    created_us=U64,
    payload_bytes=U64,
    payload_sum=U64,
)
REPLIES = st.builds(
    SampledReply,
    hash=HASH,
    fingerprint=HASH,
    text_bytes=U64,
    text_sum=U64,
    created_us=U64,
    tokens=st.lists(U32, max_size=40).map(tuple),
)
SESSIONS = st.builds(
    SessionRecord,
    fingerprint=HASH,
    session=st.text(st.characters(codec="utf-8"), max_size=40),
    title=st.text(st.characters(codec="utf-8"), max_size=40),
    is_pinned=st.booleans(),
    parent=st.just(""),
    state_key=st.just(b""),
    created_us=U64,
)


@given(PAGES)
def test_a_page_comes_back(page: PageHeader) -> None:
    record = encode_page(page)
    assert len(record) == 368
    assert decode_page(page.key, record) == page


@given(STATES)
def test_a_state_comes_back(state: StateHeader) -> None:
    assert decode_state(state.key, encode_state(state)) == state


@given(REPLIES)
def test_a_sampled_reply_comes_back(reply: SampledReply) -> None:
    assert decode_sampled(reply.hash, encode_sampled(reply)) == reply


RECORDS: dict[str, tuple[st.SearchStrategy[Any], Callable[..., bytes], Callable[..., Any]]] = {
    "page": (PAGES, encode_page, lambda page, record: decode_page(page.key, record)),
    "state": (STATES, encode_state, lambda state, record: decode_state(state.key, record)),
    "reply": (REPLIES, encode_sampled, lambda reply, record: decode_sampled(reply.hash, record)),
    "session": (SESSIONS, encode_session, lambda row, record: decode_session(row.key, record)),
}


@pytest.mark.parametrize("kind", RECORDS)
@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_is_noticed(kind: str, data: st.DataObject) -> None:
    strategy, encode, decode = RECORDS[kind]
    header = data.draw(strategy)
    record = bytearray(encode(header))
    bit = data.draw(st.integers(0, len(record) * 8 - 1))
    record[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedRecord):
        decode(header, record)


@given(st.binary(max_size=500))
def test_noise_is_noticed(noise: bytes) -> None:
    for decode in (decode_page, decode_state, decode_sampled):
        with pytest.raises(DamagedRecord):
            decode(noise[:24], noise)


PAGE = PageHeader(
    hash=b"h" * 16,
    variant=ON_GRID,
    parent=NO_PARENT,
    fingerprint=b"f" * 16,
    index=0,
    tokens=bytes(256),
    created_us=1,
    payload_bytes=2,
)


def test_a_record_under_a_wrong_key() -> None:
    with pytest.raises(DamagedRecord, match="another page's key"):
        decode_page(b"x" * 24, encode_page(PAGE))


def test_a_record_of_another_kind() -> None:
    with pytest.raises(DamagedRecord, match="another kind"):
        decode_state(b"x" * 17, encode_page(PAGE))


def test_a_record_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORD_VERSION", records.RECORD_VERSION + 1)
    record = encode_page(PAGE)
    monkeypatch.undo()
    with pytest.raises(DamagedRecord, match="version"):
        decode_page(PAGE.key, record)


def test_offsets_are_those_of_the_readme() -> None:
    """Old stores are read by these offsets: moving a field needs a new version."""
    page = encode_page(msgspec.structs.replace(PAGE, index=5, payload_sum=7))
    assert page[:6] == b"qwKV\x02\x00"
    assert page[8:32] == PAGE.key
    assert page[32:56] == PAGE.parent
    assert page[56:72] == PAGE.fingerprint
    assert page[72:80] == b"\x05\0\0\0\x40\0\0\0"
    assert page[80:104] == b"".join(n.to_bytes(8, "little") for n in (1, 2, 7))
