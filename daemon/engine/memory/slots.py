"""Which recurrent-state slots of the device are free. Numbers only, no memory. Engine thread.

The one given back longest ago goes out first: a copy out of it may still be under way.
"""

from collections import deque


class Slots:
    """The free list of a fixed number of slots."""

    def __init__(self, num_slots: int) -> None:
        self._free = deque(range(num_slots))

    @property
    def num_free(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    def take(self) -> int | None:
        """A slot with undefined content, or None when all are taken."""
        return self._free.popleft() if self._free else None

    def give_back(self, slot: int) -> None:
        """Return a slot that was taken."""
        assert slot not in self._free, f"slot {slot} is free"
        self._free.append(slot)
