"""What was learned of clients' cuts: its record, and when it is written."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from cache_harness import open_cache, saved_prompt
from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.learned_cuts import MAX_CUTS, LearnedCuts, decode_cuts, encode_cuts
from daemon.cache.offline_sessions import offline_catalogue
from daemon.cache.records import DamagedRecord, sealed

DISTANCES = st.lists(st.integers(0, 2**32 - 1), max_size=MAX_CUTS).map(tuple)


@given(DISTANCES)
def test_a_record_says_what_was_learned(cuts: tuple[int, ...]) -> None:
    assert decode_cuts(encode_cuts(cuts)) == cuts


@given(st.binary(max_size=40), st.booleans())
def test_other_bytes_are_no_record(noise: bytes, is_sealed: bool) -> None:
    record = sealed(b"qwLC" + noise) if is_sealed else noise
    try:
        assert encode_cuts(decode_cuts(record)) == record
    except DamagedRecord:
        return


def test_more_than_there_can_be_is_damage() -> None:
    content = encode_cuts((1,) * MAX_CUTS)[:-8]
    longer = content[:6] + (MAX_CUTS + 1).to_bytes(2, "little") + content[8:] + bytes(4)
    with pytest.raises(DamagedRecord):
        decode_cuts(sealed(longer))


def test_only_what_is_new_is_written() -> None:
    written: list[Mapping[bytes, bytes | None]] = []
    cuts = LearnedCuts((), write=written.append)
    cuts.keep((200,))
    cuts.keep((200, 900))
    cuts.keep((900, 200))
    assert cuts.known == (900, 200)
    assert [decode_cuts(record) for change in written for record in change.values() if record] == [
        (200,),
        (200, 900),
    ]


def test_it_outlives_the_store_being_closed_and_goes_with_the_last_session(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    for first, session in enumerate(("one", "two", "three")):
        saved_prompt(cache, 2, first, session)
    cache.cuts.keep((900,))
    cache.close()
    cache = open_cache(tmp_path)
    cache.catalogue.wipe("one")
    assert cache.cuts.known == (900,)
    cache.catalogue.wipe("two")
    cache.close()
    with offline_catalogue(tmp_path, budget_bytes=64 << 20) as catalogue:
        catalogue.wipe("three")
    cache = open_cache(tmp_path)
    assert cache.cuts.known == ()
    cache.cuts.keep((700,))
    saved_prompt(cache, 2, 0, "four")
    cache.catalogue.wipe("four")
    assert cache.cuts.known == ()
    cache.close()
    cache = open_cache(tmp_path)
    assert cache.cuts.known == ()
    assert cache.stats().num_damaged == 0
    cache.close()
