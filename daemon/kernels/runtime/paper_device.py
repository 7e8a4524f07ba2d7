"""A card on paper: it hands out addresses and counts bytes, and computes nothing.

Loading a model onto it tells what the model would take, and running it there which kernels it
launches, by the very code that does so in earnest. Needs no GPU. Owns the card that is assumed
where none is at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from daemon.kernels.runtime.compiler import Compiler, Cubin
from daemon.kernels.runtime.device import CopyStream, Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import NO_STREAM
from daemon.kernels.runtime.reservation import aligned


class Card(NamedTuple):
    """What memory depends on: multiprocessors, and shared memory that a block can ask for."""

    name: str
    arch: str
    num_sms: int
    shared_bytes_per_block: int


TYPICAL_CARD = Card("a 24 GB card", "sm_89", 128, 99 * 1024)
"""An RTX 4090, for plans made where there is no card."""


class PaperDevice(Device):
    """Stands in for a Device while memory is planned.

    Attributes:
        peak_bytes: the most that was in use at a time, by region; "" is outside of any.
    """

    computes = False

    def __init__(self, card: Card) -> None:
        self.index = -1
        self.name, self.arch, self.num_sms, self.shared_bytes_per_block = card
        self.total_bytes = 0
        self.stream = NO_STREAM
        self.peak_bytes: Counter[str] = Counter()
        self._used_bytes: Counter[str] = Counter()
        self._regions = {}
        self._region = ""

    def use_here(self) -> None:
        """Nothing to use."""

    def clear(self, region: str) -> None:
        """Count a region from nothing again."""
        self._used_bytes[region] = 0

    def allocate(self, shape: tuple[int, ...], dtype: ElementType | DTypeLike) -> DeviceArray:
        """An address that is never read."""
        array = DeviceArray(0, shape, ElementType.of(dtype), None)
        used = self._used_bytes[self._region] + aligned(array.num_bytes)
        self._used_bytes[self._region] = used
        self.peak_bytes[self._region] = max(used, self.peak_bytes[self._region])
        return array

    def allocate_pinned(self, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Host memory is not planned: pages that nobody touches take none."""
        return np.empty(num_bytes, np.uint8)

    def copy_stream(self, num_buffers: int) -> CopyStream:
        """Carries nothing."""
        return PaperStream()

    def to_device(
        self, values: np.ndarray[Any, Any], dtype: ElementType | None = None
    ) -> DeviceArray:
        """Counted, not copied."""
        return self.allocate(values.shape, dtype or ElementType.of(values.dtype))

    def write(self, array: DeviceArray, values: np.ndarray[Any, Any]) -> None:
        """Nothing is copied."""

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Nothing is copied."""

    def fill(self, array: DeviceArray, byte: int) -> None:
        """Nothing is set."""

    def synchronize(self) -> None:
        """Nothing runs."""

    def new_event(self) -> None:
        """Nothing to wait for."""

    def mark(self, event: object) -> None:
        """Nothing to wait for."""

    def wait_for(self, event: object) -> None:
        """Nothing to wait for."""


class PaperStream(CopyStream):
    """Where no copy ever is under way."""

    def __init__(self) -> None:
        """Nothing to create."""

    def close(self) -> None:
        """Nothing to give back."""


class PaperCompiler(Compiler):
    """Compiles nothing; kernels made from it can only be named."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch, None)

    def cubin(self, source: Path, defines: Mapping[str, str | int] | None = None) -> Cubin:
        """Machine code that never arrives."""
        return Cubin(Future())


def card_of(device: Device) -> Card:
    """A real device's sizes, so that what is planned on paper is what it will take."""
    return Card(device.name, device.arch, device.num_sms, device.shared_bytes_per_block)
