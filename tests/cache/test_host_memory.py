"""The memory tier: bounded, in step with the index, and never asked to be right twice."""

from pathlib import Path

from cache_harness import PAGE_BYTES, STATE_BYTES, Simulated, open_cache, prompt, saved_prompt
from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.host_memory import HostMemory


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_it_holds_what_was_used_last_within_its_bound(uses: list[tuple[int, int]]) -> None:
    memory = HostMemory(100)
    expected: list[tuple[bytes, int]] = []
    for number, size in uses:
        key = bytes([number])
        memory.keep({key: bytes(size)})
        expected = [entry for entry in expected if entry[0] != key] + [(key, size)]
        while sum(size for _, size in expected) > 100:
            expected.pop(0)
        assert memory.num_bytes == sum(size for _, size in expected)
    assert all(memory.holds(key) for key, _ in expected)
    assert sum(memory.holds(bytes([n])) for n in range(10)) == len(expected)


def test_what_was_written_is_restored_from_memory_though_the_disk_is_gone(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, memory_bytes=1 << 20)
    saved_prompt(cache, 3)
    cache.flush()
    assert cache.stats().memory_bytes == STATE_BYTES + 3 * PAGE_BYTES
    again = Simulated(cache, prompt(3))
    found = again.timeline.find(192, strict=True)
    assert found is not None
    assert found.tier == "host"
    cache._transfer._store.write = None  # type: ignore[method-assign,assignment]
    assert again.resume() is not None
    assert again.pages == [again.grid_page(index) for index in range(3)]
    del cache._transfer._store.write
    cache.close()


def test_what_was_read_is_in_memory_from_then_on(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    saved_prompt(cache, 3)
    cache.close()
    cache = open_cache(tmp_path, memory_bytes=1 << 20)
    tiers = []
    for _ in range(2):
        sequence = Simulated(cache, prompt(3))
        found = sequence.timeline.find(192, strict=True)
        assert found is not None
        assert sequence.resume() is not None
        assert sequence.pages == [sequence.grid_page(index) for index in range(3)]
        tiers.append(found.tier)
    assert tiers == ["disk", "host"]
    cache.close()


def test_room_is_made_before_reading_so_that_old_buffers_can_be_read_into(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    saved_prompt(cache, 3)
    saved_prompt(cache, 4, first=9)
    cache.close()
    cache = open_cache(tmp_path, memory_bytes=STATE_BYTES + 5 * PAGE_BYTES)
    assert Simulated(cache, prompt(3)).resume() is not None
    held = cache.stats().memory_bytes
    assert held == STATE_BYTES + 3 * PAGE_BYTES
    seen, sizes = [], []

    def allocate(num_bytes: int) -> memoryview:
        seen.append(cache._transfer._holdings.memory.num_bytes)
        sizes.append(num_bytes)
        return memoryview(bytearray(num_bytes))

    cache.expect(STATE_BYTES, PAGE_BYTES, allocate)
    assert Simulated(cache, prompt(4, first=9)).resume() is not None
    assert sizes == [STATE_BYTES, *[PAGE_BYTES] * 4]
    assert set(seen) == {0}
    assert cache.stats().memory_bytes == STATE_BYTES + 4 * PAGE_BYTES
    cache.close()


def test_what_is_evicted_or_wiped_leaves_memory_too(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, memory_bytes=1 << 20)
    saved_prompt(cache, 3)
    cache.flush()
    cache._transfer.wipe([state.header.key for state in cache._transfer.states()])
    cache.flush()
    assert cache.stats().memory_bytes == 0
    assert Simulated(cache, prompt(3)).resume() is None
    cache.close()


def test_what_is_lent_to_others_leaves_less_room() -> None:
    memory = HostMemory(100)
    memory.keep({b"a": bytes(40), b"b": bytes(40)})
    memory.lend(30)
    assert (memory.holds(b"a"), memory.holds(b"b")) == (False, True)
    memory.lend(0)
    memory.keep({b"c": bytes(60)})
    assert memory.num_bytes == 100
