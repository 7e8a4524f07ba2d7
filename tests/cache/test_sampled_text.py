from collections.abc import Mapping
from pathlib import Path

from cache_harness import MODEL, open_cache
from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.sampled_text import SampledText, decode_aged


class Disk:
    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        for key, record in changes.items():
            if record is None:
                self.records.pop(key, None)
            else:
                self.records[key] = record

    def open(self, fingerprint: bytes = MODEL, max_bytes: int = 10_000) -> SampledText:
        records = {key: decode_aged(key, record) for key, record in self.records.items()}
        return SampledText(records, fingerprint=fingerprint, max_bytes=max_bytes, write=self.write)


@given(st.dictionaries(st.text(max_size=20), st.lists(st.integers(0, 2**32 - 1)).map(tuple)))
def test_recalls_exactly_before_and_after_a_restart(replies: dict[str, tuple[int, ...]]) -> None:
    disk = Disk()
    text = disk.open(max_bytes=10**6)
    text.remember(list(replies.items()))
    for memory in (text, disk.open(max_bytes=10**6)):
        assert {reply: memory.recall(reply) for reply in replies} == replies
        assert memory.recall("never said" * 3) is None


def test_the_latest_tokens_of_a_text_count() -> None:
    text = Disk().open()
    text.remember([("a", (1, 2)), ("a", (3,))])
    assert text.recall("a") == (3,)


def test_models_do_not_share() -> None:
    disk = Disk()
    disk.open().remember([("a", (1,))])
    assert disk.open(b"of another model").recall("a") is None
    assert disk.open().recall("a") == (1,)


def test_lone_surrogates_are_text_too() -> None:
    text = Disk().open()
    text.remember([("\ud800", (1,))])
    assert text.recall("\ud800") == (1,)


def test_the_least_recently_used_goes_first() -> None:
    disk = Disk()
    text = disk.open(max_bytes=400)
    text.remember([("first", (1,) * 20), ("second", (2,) * 20)])
    assert text.recall("first") is not None
    text.remember([("third", (3,) * 20)])
    assert text.recall("second") is None
    assert text.recall("first") == (1,) * 20
    assert sum(map(len, disk.records.values())) <= 400


def test_too_much_on_disk_is_cut() -> None:
    disk = Disk()
    disk.open().remember([(str(n), (n,) * 20) for n in range(20)])
    text = disk.open(max_bytes=400)
    assert len(text) == len(disk.records) == 2
    assert text.recall("19") == (19,) * 20


def test_persisted_by_the_cache(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.sampled.remember([("said", (5, 6))])
    cache.close()
    cache = open_cache(tmp_path)
    assert cache.sampled.recall("said") == (5, 6)
    assert cache.stats().num_sampled_replies == 1
    cache.close()
