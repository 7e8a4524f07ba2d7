"""Who goes when there is no room: over a store of several conversations."""

from pathlib import Path

from cache_harness import Simulated, open_cache, prompt

from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.checkpoint import Reason

BUDGET = 16 << 20
"""13 MiB of it for checkpoints: ten states of a million bytes, with their pages."""

LARGE = {"state_bytes": 1_000_000, "page_bytes": 10_000}


def talk(cache: CheckpointCache, tokens: list[int], *, reason: Reason = "prompt") -> Simulated:
    """One request as the engine plays it; keeps its end."""
    sequence = Simulated(cache, tokens, **LARGE)
    sequence.resume(limit=len(tokens) - 1)
    sequence.prefill()
    if len(tokens) // 64 * 64 > 0:
        sequence.save(len(tokens) // 64 * 64, reason)
    cache.flush()
    return sequence


def stored(cache: CheckpointCache) -> set[int]:
    return {state.header.position for state in cache._transfer.states()}


def test_superseded_states_go_before_the_end_of_another_conversation(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, budget_bytes=BUDGET)
    other = talk(cache, prompt(40, first=7))
    for num_pages in range(4, 36, 2):
        talk(cache, prompt(num_pages))
    assert cache.stats().num_evicted > 0
    assert {40 * 64, 34 * 64} <= stored(cache)
    assert cache.reach(other.tokens, 10_000, strict=True).found is not None
    cache.close()


def test_a_side_request_never_evicts_the_conversation_it_came_from(
    tmp_path: Path,
) -> None:
    cache = open_cache(tmp_path, budget_bytes=BUDGET)
    talk(cache, prompt(8), reason="system")
    main = talk(cache, prompt(100))
    for number in range(1, 30):
        side = prompt(8) + prompt(6, first=number)
        talk(cache, side)
        talk(cache, side + [1] * 64)
    assert cache.stats().num_evicted > 20
    found = cache.reach(main.tokens, 10_000, strict=True).found
    assert found is not None
    assert found.position == 6400
    cache.close()


def test_the_shared_beginning_stays_while_requests_that_came_once_go(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, budget_bytes=BUDGET)
    talk(cache, prompt(20), reason="system")
    for number in range(1, 20):
        talk(cache, prompt(20) + prompt(4, first=number))
    assert 20 * 64 in stored(cache)
    cache.close()


def test_the_canonical_twin_takes_the_place_of_the_decoded_state(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    talking = talk(cache, prompt(2))
    talking.decode([5] * 128)
    talking.save(256, "reply")
    cache.flush()
    assert cache.stats().checkpoints_by_birth == {"prompt": 1, "decode": 1}
    again = Simulated(cache, talking.tokens, **LARGE)
    again.resume(strict=True)
    again.prefill()
    again.save(256, "reply")
    cache.flush()
    stats = cache.stats()
    assert stats.checkpoints_by_birth == {"prompt": 2}
    assert (stats.num_pages, stats.num_evicted, stats.num_dropped) == (4, 0, 0)
    cache.close()
