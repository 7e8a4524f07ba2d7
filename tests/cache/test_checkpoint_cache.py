"""The whole of cache/ through its front door."""

import errno
import os
import threading
from pathlib import Path

import pytest
from cache_harness import (
    MODEL,
    PAGE_BYTES,
    STATE_BYTES,
    Simulated,
    grid_bytes,
    open_cache,
    prompt,
    saved_prompt,
)

from daemon.checkpoint import Boundary, Found, Snapshot
from daemon.engine.checkpointing import CheckpointStore
from daemon.errors import ConfigError, StoreError, StoreInUse


def test_fulfils_the_engines_contract(tmp_path: Path) -> None:
    cache: CheckpointStore = open_cache(tmp_path)
    assert cache.timeline([1, 2, 3], "").find(3, strict=False) is None


def test_a_changed_prompt_resumes_where_it_still_agrees(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    first = Simulated(cache, prompt(6))
    first.prefill()
    for position in (128, 256, 384):
        first.save(position)
    changed = prompt(6)
    changed[300] = 7
    second = Simulated(cache, changed)
    assert second.resume() == Found(256, "prompt", "interval")
    assert second.state == grid_bytes("state", changed[:256], STATE_BYTES)
    assert second.pages == [second.grid_page(index) for index in range(4)]
    cache.close()


@pytest.mark.parametrize("is_flushed", [False, True], ids=["queued", "stored"])
def test_equal_before_and_after_a_restart(tmp_path: Path, is_flushed: bool) -> None:
    cache = open_cache(tmp_path)
    first = saved_prompt(cache, 5)
    if is_flushed:
        cache.flush()
    again = Simulated(cache, first.tokens)
    assert again.resume() == Found(320, "prompt", "prompt")
    assert again.pages == first.pages
    cache.close()
    cache = open_cache(tmp_path)
    restarted = Simulated(cache, first.tokens)
    assert restarted.resume() == Found(320, "prompt", "prompt")
    assert restarted.pages == first.pages
    assert restarted.state == again.state
    assert cache.stats().num_damaged == 0
    cache.close()


def test_limit_leaves_a_token_to_evaluate(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = saved_prompt(cache, 2)
    assert sequence.timeline.find(127, strict=False) is None
    assert sequence.timeline.find(128, strict=False) is not None
    cache.close()


def test_prompt_born_wins_and_strict_takes_no_other(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    talking = Simulated(cache, prompt(1))
    talking.prefill()
    talking.save(64, "prompt")
    talking.decode(list(range(100, 228)))
    talking.save(192, "reply")
    again = Simulated(cache, talking.tokens)
    assert again.resume() == Found(192, "decode", "reply")
    assert again.pages == talking.pages
    assert again.num_grid_pages == 1
    strict = Simulated(cache, talking.tokens)
    assert strict.resume(strict=True) == Found(64, "prompt", "prompt")
    strict.prefill()
    assert strict.snapshot(192).pages.keys() == {1, 2}, "decoded pages are none of the grid's"
    strict.save(192, "user")
    assert Simulated(cache, talking.tokens).resume() == Found(192, "prompt", "user")
    cache.close()


def test_decoded_pages_of_two_runs_never_mix(tmp_path: Path) -> None:
    """The same tokens decoded twice have other bits: each checkpoint gives back its own."""
    cache = open_cache(tmp_path)
    runs = []
    for _ in range(2):
        run = Simulated(cache, prompt(1))
        run.prefill()
        run.decode(list(range(128)))
        runs.append(run)
    runs[0].save(128, "reply")
    assert list(runs[1].timeline.missing_pages(192, 1)) == [1, 2]
    runs[1].save(192, "reply")
    cache.flush()
    short, long = Simulated(cache, runs[0].tokens), Simulated(cache, runs[0].tokens)
    assert short.resume(limit=128) == Found(128, "decode", "reply")
    assert long.resume() == Found(192, "decode", "reply")
    assert short.pages == runs[0].pages[:2]
    assert long.pages == runs[1].pages
    cache.close()


def test_goes_on_from_a_decoded_checkpoint_without_writing_its_pages_again(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    talking = Simulated(cache, prompt(1))
    talking.prefill()
    talking.decode(list(range(128)))
    talking.save(192, "reply")
    longer = Simulated(cache, [*talking.tokens, *range(256)])
    longer.resume()
    longer.prefill()
    assert list(longer.snapshot(448).pages) == [3, 4, 5, 6]
    longer.save(320, "user")
    longer.save(448, "prompt")
    cache.close()
    cache = open_cache(tmp_path)
    again = Simulated(cache, longer.tokens)
    assert again.resume() == Found(448, "decode", "prompt")
    assert again.pages == longer.pages
    assert cache.stats().num_pages == 7
    cache.close()


def test_pages_are_stored_once(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    saved_prompt(cache, 8)
    written = saved_prompt(cache, 8)
    assert list(written.timeline.missing_pages(512, 8)) == []
    longer = Simulated(cache, [*written.tokens, *range(64)])
    longer.resume()
    longer.prefill()
    assert list(longer.save(576).pages) == [8]
    cache.flush()
    stats = cache.stats()
    assert (stats.num_pages, stats.num_checkpoints, stats.num_written) == (9, 2, 2)
    assert stats.written_bytes == 9 * PAGE_BYTES + 2 * STATE_BYTES
    cache.close()


def test_positions_leave_out_what_is_stored(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, interval_tokens=256)
    sequence = Simulated(cache, prompt(20))
    boundaries = [Boundary(100, "system"), Boundary(700, "user"), Boundary(1279, "prompt")]
    assert sequence.timeline.positions(boundaries, 0) == {
        64: "system",
        256: "interval",
        512: "interval",
        640: "user",
        768: "interval",
        1024: "interval",
        1152: "interval",
        1216: "prompt",
        1280: "reply",
    }
    sequence.prefill()
    sequence.save(640, "user")
    assert 640 not in sequence.timeline.positions(boundaries, 0)
    assert min(sequence.timeline.positions(boundaries, 640)) > 640
    cache.close()


def test_models_do_not_share(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    saved_prompt(cache, 3)
    cache.close()
    other = open_cache(tmp_path, fingerprint=b"of another model")
    assert other.timeline(prompt(3), "").find(192, strict=False) is None
    saved_prompt(other, 3)
    assert other.stats().num_checkpoints == 2
    other.close()
    cache = open_cache(tmp_path)
    assert Simulated(cache, prompt(3)).resume() is not None
    cache.close()


def test_sessions_group_checkpoints(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    for session, first in (("a\ud800é" + "x" * 300, 1), ("b", 2)):
        sequence = Simulated(cache, prompt(4, first), session)
        sequence.prefill()
        sequence.save(64, "system")
        sequence.save(256, "prompt")
    cache.flush()
    rows = cache.catalogue.rows()
    assert [row.session for row in rows] == ["b", "aé" + "x" * 253]
    assert rows[0].num_tokens == 256
    assert [(c.position, c.reason, c.born) for c in rows[0].checkpoints] == [
        (64, "system", "prompt"),
        (256, "prompt", "prompt"),
    ]
    assert rows[0].model == MODEL.hex()
    stats = cache.stats()
    assert stats.checkpoints_by_reason == {"system": 2, "prompt": 2}
    assert stats.checkpoints_by_birth == {"prompt": 4}
    assert 0 < stats.num_bytes < stats.budget_bytes
    cache.close()


def test_damage_is_a_clean_miss(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = saved_prompt(cache, 4)
    sequence.save(128, "user")
    cache.flush()
    # The same chain, other token ids: a collision, as far as the store can tell.
    sequence.timeline._chain._tokens[3] += 1
    found = sequence.timeline.find(256, strict=False)
    assert found is not None
    assert sequence.timeline.load(found).result(timeout=20) is None
    assert sequence.timeline.find(256, strict=False) is None
    cache.flush()
    stats = cache.stats()
    assert (stats.num_damaged, stats.num_checkpoints, stats.num_pages) == (1, 0, 0)
    cache.close()


def test_save_after_its_pages_went_is_given_up(tmp_path: Path) -> None:
    """Between `missing_pages` and `save` an eviction may take a page that was counted on."""
    cache = open_cache(tmp_path)
    sequence = saved_prompt(cache, 4)
    snapshot = Snapshot(256, "prompt", 4, b"", {3: sequence.pages[3]})
    other = Simulated(cache, prompt(4, first=9))
    other.timeline.save(snapshot, "prompt")
    assert other.timeline.find(256, strict=False) is None
    assert cache.stats().num_dropped == 1
    assert cache.stats().num_pages == 4
    cache.close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("daemon.cache.writer_lock.os.open", refused)
    with pytest.raises(ConfigError, match=f"Cannot write in .*{os.strerror(number)}"):
        open_cache(tmp_path)


def test_two_daemons(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    with pytest.raises(StoreInUse, match="Another qwend"):
        open_cache(tmp_path)
    cache.close()
    open_cache(tmp_path).close()


@pytest.mark.parametrize(
    "settings", [{"interval_tokens": 100}, {"interval_tokens": 0}, {"budget_bytes": 10}]
)
def test_settings_that_cannot_be_used(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        open_cache(tmp_path, **settings)


def test_a_failed_opening_lets_go_of_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("daemon.cache.checkpoint_cache.Transfer", None)
        with pytest.raises(TypeError):
            open_cache(tmp_path)
    open_cache(tmp_path).close()


def test_close_loses_nothing_and_later_saves_are_counted(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequences = [saved_prompt(cache, 6, first) for first in range(20)]
    cache.close()
    sequences[0].decode(list(range(64)))
    sequences[0].save(448, "reply")
    assert (cache.stats().num_written, cache.stats().num_dropped) == (20, 1)
    cache = open_cache(tmp_path)
    assert all(Simulated(cache, s.tokens).resume() for s in sequences)
    cache.close()


def test_threads_may_read_stats_while_an_engine_saves(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    problems: list[Exception] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            try:
                cache.catalogue.rows()
                cache.stats()
            except Exception as error:
                problems.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for first in range(30):
        saved_prompt(cache, 4, first)
        assert Simulated(cache, prompt(4, first)).resume() is not None
    is_over.set()
    watcher.join()
    assert problems == []
    cache.close()


def test_open_explains_a_path_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises((ConfigError, StoreError), match="Cannot make the folder"):
            open_cache(path)


@pytest.mark.parametrize("num_shared", [0, 63, 64, 100, 640])
def test_timelines_know_how_far_they_are_alike(tmp_path: Path, num_shared: int) -> None:
    cache = open_cache(tmp_path)
    tokens = prompt(10)
    other = [*tokens[:num_shared], *[7] * 100]
    one, two = (cache.timeline(each, "") for each in (tokens, other))
    assert one.shared_with(two) == two.shared_with(one) == num_shared // 64 * 64
    cache.close()
