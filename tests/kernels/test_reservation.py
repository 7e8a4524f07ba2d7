"""Regions of one reservation never overlap, and arrays never leave their region."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.reservation import ALIGNMENT, aligned, cut_regions

SIZES = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5000), min_size=1)


@given(SIZES, st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 700)), max_size=40))
def test_arrays_lie_apart_and_aligned(sizes: dict[str, int], asked: list[tuple[str, int]]) -> None:
    total = sum(map(aligned, sizes.values()))
    memory = DeviceArray(ALIGNMENT * 7, (total,), ElementType.U8, None)
    regions = cut_regions(memory, sizes)
    taken = []
    for name, num_bytes in asked:
        region = regions.get(name)
        if region is None or region.used_bytes + aligned(num_bytes) > sizes[name]:
            continue
        array = region.allocate((num_bytes,), ElementType.U8)
        assert array.pointer % ALIGNMENT == 0
        taken.append((array.pointer, array.pointer + num_bytes))
    taken.sort()
    for (_, end), (start, _) in zip(taken, taken[1:], strict=False):
        assert end <= start
    assert all(end <= memory.pointer + total for _, end in taken)


def test_a_region_planned_too_small_is_our_own_mistake() -> None:
    memory = DeviceArray(0, (512,), ElementType.U8, None)
    region = cut_regions(memory, {"weights": 512})["weights"]
    region.allocate((100,), ElementType.F32)
    with pytest.raises(AssertionError, match="weights is planned too small"):
        region.allocate((1,), ElementType.U8)
    region.clear()
    assert region.allocate((128,), ElementType.F32).pointer == 0
