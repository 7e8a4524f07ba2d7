"""What a store says of a prompt without reading it: the nearest checkpoint, what was nearer once,
and the prompts of an earlier run."""

from array import array
from pathlib import Path

from cache_harness import MODEL, Simulated, open_cache, prompt, saved_prompt
from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.departures import Departures
from daemon.checkpoint import Birth, Departed, Found


def test_the_nearest_checkpoint_and_its_tier(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = saved_prompt(cache, 4)
    cache.flush()
    reach = cache.reach(sequence.tokens, len(sequence.tokens) - 1, False)
    assert reach.found is None
    longer = [*sequence.tokens, 1]
    assert cache.reach(longer, len(sequence.tokens), False).found == Found(
        256, "prompt", "prompt", "disk"
    )
    cache.close()


def test_what_lies_on_the_device_counts_too(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = saved_prompt(cache, 2)
    longer = [*sequence.tokens, *range(300)]
    timeline = cache.timeline(longer, "")
    births: dict[bytes, Birth] = {
        timeline.name(64): "prompt",
        timeline.name(192): "prompt",
        timeline.name(256): "decode",
    }

    def reached(limit: int, strict: bool) -> Found | None:
        return cache.reach(longer, limit, strict, births.get).found

    assert reached(10_000, strict=False) == Found(256, "decode", "junction", "device")
    assert reached(10_000, strict=True) == Found(192, "prompt", "junction", "device")
    assert reached(191, strict=False) == Found(128, "prompt", "prompt", "host")
    assert reached(127, strict=False) == Found(64, "prompt", "junction", "device")
    cache.close()


def test_wipes_and_discards_revoke_what_was_made(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sequence = saved_prompt(cache, 2)
    before = cache.num_wipes
    cache.discard(sequence.tokens)
    assert cache.num_wipes > before
    cache.close()


def test_what_was_evicted_is_known(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, budget_bytes=16 << 20)
    first = saved_prompt(cache, 4)
    for number in range(1, 1000):
        saved_prompt(cache, 4, first=number)
        cache.flush()
        if cache.stats().num_evicted:
            break
    reach = cache.reach([*first.tokens, 1], 256, False)
    assert (reach.found, reach.departed) == (None, Departed(256, "evicted"))
    again = saved_prompt(cache, 4)
    reach = cache.reach([*again.tokens, 1], 256, False)
    assert reach.found is not None
    assert reach.departed is None
    cache.close()


def test_prompts_of_an_earlier_run_come_back(tmp_path: Path) -> None:
    with_two = open_cache(tmp_path)
    saved_prompt(with_two, 2)
    longer = saved_prompt(with_two, 5, first=7)
    longer.save(128, "user")
    with_two.close()
    cache = open_cache(tmp_path)
    stored = cache.stored_prompts(10_000)
    assert [list(array("I", found.tokens)) for found in stored] == [prompt(5, 7), prompt(2)]
    assert {found.fingerprint for found in stored} == {MODEL}
    assert [len(found.tokens) for found in cache.stored_prompts(400)] == [5 * 64 * 4]
    cache.close()


@given(st.lists(st.integers(0, 9)), st.integers(0, 640), st.integers(0, 640))
def test_the_deepest_departure(gone: list[int], start: int, stop: int) -> None:
    hashes = [bytes([index]) * 16 for index in range(10)]
    departures = Departures()
    departures.add((hashes[index] for index in gone), "evicted")
    positions = [(i + 1) * 64 for i in set(gone) if start // 64 <= i < stop // 64]
    expected = Departed(max(positions), "evicted") if positions else None
    assert departures.deepest(hashes, start, stop) == expected


def test_departures_are_bounded() -> None:
    departures = Departures(2)
    hashes = [bytes([index]) * 16 for index in range(3)]
    departures.add(hashes, "dropped")
    assert departures.deepest(hashes[:1], 0, 64) is None
    departures.discard(hashes[2])
    assert departures.deepest(hashes, 0, 192) == Departed(128, "dropped")


def test_what_an_audit_found_wrong_goes_with_all_that_shares_its_pages(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    wrong = saved_prompt(cache, 4)
    branch = Simulated(cache, [*wrong.tokens[:128], *range(128)])
    branch.resume()
    branch.prefill()
    branch.save(256, "prompt")
    other = saved_prompt(cache, 4, first=9)
    cache.discard(wrong.tokens)
    assert cache.reach([*branch.tokens, 1], 256, False).found is None
    reach = cache.reach([*wrong.tokens, 1], 256, False)
    assert (reach.found, reach.departed) == (None, Departed(256, "damaged"))
    assert cache.reach([*other.tokens, 1], 256, False).found is not None
    cache.close()
