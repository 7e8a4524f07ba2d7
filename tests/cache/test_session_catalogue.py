"""Sessions as objects: what is listed, kept, forked, taken elsewhere and deleted."""

from pathlib import Path

import pytest
from cache_harness import MODEL, Simulated, open_cache, prompt, saved_prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.cache.records import DamagedRecord
from daemon.cache.session_records import SessionRecord, decode_session, encode_session
from daemon.errors import InvalidRequest, SessionFileError, UnknownSession

OTHER_MODEL = b"some other model"


def talk(
    cache: CheckpointCache, session: str, num_pages: int = 4, first: int = 0, **sizes: int
) -> Simulated:
    """A session with a checkpoint after its first page and one at its end."""
    sequence = Simulated(cache, prompt(num_pages, first), session, **sizes)
    sequence.resume()
    sequence.prefill()
    sequence.save(64, "system")
    sequence.save(num_pages * 64, "prompt")
    return sequence


def export(cache: CheckpointCache, name: str, path: Path) -> Path:
    path.write_bytes(b"".join(cache.catalogue.export(name)))
    return path


def texts(max_size: int = 40) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=max_size)


@given(texts(), texts(), st.booleans(), texts(), st.sampled_from([b"", b"k" * 17]))
def test_a_record_comes_back(
    session: str, title: str, is_pinned: bool, parent: str, state_key: bytes
) -> None:
    record = SessionRecord(
        fingerprint=MODEL,
        session=session,
        title=title,
        is_pinned=is_pinned,
        parent=parent,
        state_key=state_key,
        created_us=7,
    )
    encoded = encode_session(record)
    assert decode_session(record.key, encoded) == record
    for damaged in (encoded[:-1], b"x" + encoded[1:], encoded + b"x"):
        with pytest.raises(DamagedRecord):
            decode_session(record.key, damaged)
    with pytest.raises(DamagedRecord):
        decode_session(b"another key, 16.", encoded)


def test_titles_and_pins_outlive_the_daemon(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    talk(cache, "one")
    cache.suggest_title("one", "Generate a title", is_final=False)
    cache.suggest_title("one", "Fix the parser")
    cache.suggest_title("one", "A later question")
    row = cache.catalogue.change("one", is_pinned=True)
    cache.close()
    cache = open_cache(tmp_path)
    (again,) = cache.catalogue.rows()
    assert (again.title, again.is_pinned, again.num_tokens) == ("Fix the parser", True, 256)
    assert cache.catalogue.change(row.id, title="Parser", is_pinned=False).title == "Parser"
    cache.close()


def test_parents_are_those_whose_work_it_goes_on_from(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    talk(cache, "main")
    sub_agent = Simulated(cache, [*prompt(4), *range(64)], "sub")
    assert sub_agent.resume() is not None
    sub_agent.prefill()
    sub_agent.save(320, "prompt")
    main, sub = sorted(cache.catalogue.rows(), key=lambda row: row.num_tokens)
    assert (main.parents, sub.parents) == ((), (main.id,))
    cache.close()


def test_a_pinned_session_is_never_evicted(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, budget_bytes=16 << 20)
    sizes = {"page_bytes": 40_000, "state_bytes": 200_000}
    pinned = talk(cache, "pinned", first=1000, **sizes)
    cache.catalogue.change("pinned", is_pinned=True)
    for number in range(1, 60):
        talk(cache, f"other {number}", first=number, **sizes)
        cache.flush()
    assert cache.stats().num_evicted > 20
    found = cache.reach(pinned.tokens, 256, strict=False).found
    assert found is not None
    assert found.position == 256
    cache.catalogue.change("pinned", is_pinned=False)
    for number in range(100, 160):
        talk(cache, f"other {number}", first=number, **sizes)
        cache.flush()
    assert cache.reach(pinned.tokens, 256, strict=False).found is None
    cache.close()


def test_no_more_is_pinned_than_leaves_room(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, budget_bytes=16 << 20)
    for number in range(2):
        talk(cache, str(number), first=number, page_bytes=10_000, state_bytes=2_000_000)
    cache.catalogue.change("0", is_pinned=True)
    with pytest.raises(InvalidRequest, match="unpin another, or raise --cache-size"):
        cache.catalogue.change("1", is_pinned=True)
    cache.close()


def test_a_fork_stays_when_the_other_is_wiped(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    first = talk(cache, "one")
    fork = cache.catalogue.fork("one", "two", position=200, title="")
    assert (fork.session, fork.num_tokens) == ("two", 64)
    whole = cache.catalogue.fork("one", "three", position=None, title="Whole")
    (one,) = [row for row in cache.catalogue.rows() if row.session == "one"]
    assert (whole.num_tokens, whole.parents, whole.title) == (256, (one.id,), "Whole")
    cache.catalogue.wipe("one")
    cache.close()
    cache = open_cache(tmp_path)
    left = {row.session: row.num_tokens for row in cache.catalogue.rows()}
    assert left == {"two": 64, "three": 256}
    assert Simulated(cache, [*first.tokens, 1]).resume() is not None
    for row in cache.catalogue.rows():
        cache.catalogue.wipe(row.id)
    assert cache.catalogue.rows() == ()
    assert cache.stats().num_pages == 0
    cache.close()


@pytest.mark.parametrize(("session", "position"), [("one", None), ("", None)])
def test_a_fork_needs_a_name_of_its_own(tmp_path: Path, session: str, position: int | None) -> None:
    cache = open_cache(tmp_path)
    talk(cache, "one")
    with pytest.raises(InvalidRequest):
        cache.catalogue.fork("one", session, position=position, title="")
    with pytest.raises(InvalidRequest, match=r"before 63 tokens; its first is at 64\."):
        cache.catalogue.fork("one", "two", position=63, title="")
    cache.close()


def test_wiping_leaves_nothing_of_it(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    talk(cache, "other", first=5)
    secret = talk(cache, "secret", first=9)
    inside, outside = tuple(secret.tokens[70:90]), (7, 7, 7)
    cache.sampled.remember([("said", inside), ("said elsewhere", outside)])
    cache.suggest_title("secret", "A secret question")
    row = cache.catalogue.wipe("secret")
    assert (row.session, row.num_tokens) == ("secret", 256)
    assert [left.session for left in cache.catalogue.rows()] == ["other"]
    assert (cache.sampled.recall("said"), cache.sampled.recall("said elsewhere")) == (None, outside)
    reach = cache.reach([*secret.tokens, 1], 256, False)
    assert reach.departed is not None
    assert (reach.found, reach.departed.cause) == (None, "wiped")
    with pytest.raises(UnknownSession, match="no session 'secret'"):
        cache.catalogue.wipe("secret")
    cache.close()


def test_a_session_moves_to_another_machine(tmp_path: Path) -> None:
    here = open_cache(tmp_path / "here")
    sequence = talk(here, "one")
    sequence.decode(list(range(100)))
    sequence.save(320, "reply")
    here.suggest_title("one", "Titel für alle")
    path = export(here, "one", tmp_path / "one.qwend")
    there = open_cache(tmp_path / "there")
    row = there.catalogue.take_in(path, None)
    assert (row.session, row.title, row.num_tokens) == ("one", "Titel für alle", 320)
    named = there.catalogue.take_in(path, "again")
    assert named.num_tokens == 320
    there.close()
    there = open_cache(tmp_path / "there")
    again = Simulated(there, sequence.tokens)
    assert again.resume(limit=319) is not None
    assert again.pages == [sequence.grid_page(index) for index in range(4)]
    decoded = Simulated(there, sequence.tokens)
    found = decoded.resume()
    assert found is not None
    assert (found.position, found.born) == (320, "decode")
    assert decoded.pages == sequence.pages
    here.close()
    there.close()


def test_an_import_changes_nothing_that_people_said(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "store")
    talk(cache, "one")
    path = export(cache, "one", tmp_path / "file")
    cache.catalogue.change("one", title="Mine", is_pinned=True)
    row = cache.catalogue.take_in(path, None)
    assert (row.title, row.is_pinned, len(row.checkpoints)) == ("Mine", True, 2)
    cache.catalogue.fork("one", "two", position=None, title="")
    cache.catalogue.wipe("one")
    assert cache.catalogue.take_in(path, None).num_tokens == 256
    cache.close()


def test_another_models_session_is_refused(tmp_path: Path) -> None:
    here = open_cache(tmp_path / "here")
    talk(here, "one")
    path = export(here, "one", tmp_path / "file")
    here.close()
    there = open_cache(tmp_path / "there", OTHER_MODEL)
    with pytest.raises(SessionFileError, match="weights, template, KV format and arithmetic"):
        there.catalogue.take_in(path, None)
    assert there.catalogue.rows() == ()
    there.close()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_refused_and_nothing_of_it_stored(
    exported: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(exported)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    path = tmp_path / "file"
    path.write_bytes(damaged)
    there = open_cache(tmp_path / "there")
    try:
        with pytest.raises(SessionFileError):
            there.catalogue.take_in(path, None)
        assert there.catalogue.rows() == ()
    finally:
        there.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("exported")
    cache = open_cache(folder / "store")
    talk(cache, "one")
    content = export(cache, "one", folder / "file").read_bytes()
    cache.close()
    return content


def test_an_export_holds_what_was_never_written(tmp_path: Path) -> None:
    here = open_cache(tmp_path / "here", daily_bytes=1)
    saved_prompt(here, 2, first=1)
    here.flush()
    sequence = talk(here, "one")
    sequence.save(128, "section")
    sequence.decode(list(range(100)))
    sequence.save(320, "reply")
    here.flush()
    assert here.stats().num_written == 1
    path = export(here, "one", tmp_path / "file")
    assert here.stats().num_written == 1
    here.close()
    there = open_cache(tmp_path / "there")
    row = there.catalogue.take_in(path, None)
    assert [kept.position for kept in row.checkpoints] == [64, 128, 256, 320]
    again = Simulated(there, sequence.tokens)
    found = again.resume()
    assert found is not None
    assert (found.position, found.born, again.pages) == (320, "decode", sequence.pages)
    there.close()


def test_a_wipe_takes_the_replies_of_what_was_never_written(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, daily_bytes=1)
    saved_prompt(cache, 2, first=1)
    cache.flush()
    secret = talk(cache, "secret", first=9)
    cache.sampled.remember([("said", tuple(secret.tokens[70:90]))])
    cache.catalogue.wipe("secret")
    assert cache.sampled.recall("said") is None
    cache.close()


def test_what_has_begun_before_a_wipe_brings_nothing_back(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    running = talk(cache, "secret")
    other = Simulated(cache, running.tokens, "other")
    cache.catalogue.wipe("secret")
    running.decode(list(range(100)))
    running.save(320, "reply")
    assert cache.catalogue.rows() == ()
    other.prefill()
    other.save(128, "prompt")
    talk(cache, "secret", first=3)
    assert {row.session for row in cache.catalogue.rows()} == {"other", "secret"}
    cache.close()
