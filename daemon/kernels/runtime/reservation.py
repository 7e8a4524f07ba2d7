"""One stretch of device memory in named regions, and how much of each is in use.

Owns where in a region the next array goes; knows nothing of what the arrays are for. No device
needed: the memory is somebody's array, or, to find out how much is needed, no memory at all.
"""

import math
from collections.abc import Mapping

from daemon.kernels.runtime.device_array import DeviceArray, ElementType

ALIGNMENT = 256
"""Of every array, in bytes: what the driver's own allocations have, and copies in bulk ask for."""


class Region:
    """Arrays are cut from the front and all given up together."""

    def __init__(self, name: str, memory: DeviceArray) -> None:
        self.name = name
        self.used_bytes = 0
        self._memory = memory

    def allocate(self, shape: tuple[int, ...], element: ElementType) -> DeviceArray:
        """The next array; that it fits was made sure when the region was planned."""
        start = self.used_bytes
        self.used_bytes += aligned(math.prod(shape) * element.num_bytes)
        assert self.used_bytes <= self._memory.num_bytes, f"region {self.name} is planned too small"
        return self._memory.view(shape, element, start)

    def clear(self) -> None:
        """Begin again at the front; arrays cut before must not be used any more."""
        self.used_bytes = 0


def cut_regions(memory: DeviceArray, sizes: Mapping[str, int]) -> dict[str, Region]:
    """Regions of `sizes` bytes, one after the other, each beginning aligned."""
    regions, start = {}, 0
    for name, num_bytes in sizes.items():
        regions[name] = Region(name, memory.view((num_bytes,), ElementType.U8, start))
        start += aligned(num_bytes)
    return regions


def aligned(num_bytes: int) -> int:
    """Rounded up to whole units of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
