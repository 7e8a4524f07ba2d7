"""Sequences that have ended and whose pages still lie on the device, for the next of their kind.

Owns the list, the last used last; the numbers of pages and slots are the scheduler's. A request
that goes on from one takes its places over: nothing is copied or read. Engine thread only.
"""

from collections.abc import Sequence

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth
from daemon.engine.checkpointing import Timeline


class Resident(Struct, frozen=True):
    """A prefix on the device: its tokens, the pages of all of them, and the slot of the state after
    them. `timeline` knows what the pages are called in the store; see `Snapshot` for the rest."""

    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    slot: int
    born: Birth
    num_grid_pages: int
    timeline: Timeline

    @property
    def position(self) -> int:
        """Tokens of the prefix, a multiple of PAGE_TOKENS."""
        return len(self.tokens)


class Residents:
    """At most so many as are allowed, and as leave places to who needs them."""

    def __init__(self) -> None:
        self._residents: list[Resident] = []

    def __len__(self) -> int:
        return len(self._residents)

    def add(self, resident: Resident) -> None:
        """Add the one that was used last."""
        self._residents.append(resident)

    def take(self, tokens: Sequence[int], limit: int, strict: bool) -> Resident | None:
        """Take out the longest that `tokens` begin with, of at most `limit` tokens; `strict`: born
        by prompt evaluation."""
        fitting = [
            resident
            for resident in self._residents
            if resident.position <= limit
            and (resident.born == "prompt" or not strict)
            and _begins_with(tokens, resident.tokens)
        ]
        best = max(fitting, key=lambda resident: resident.position, default=None)
        if best is not None:
            self._residents.remove(best)
        return best

    def take_oldest(self, spare_newest: bool = False) -> Resident | None:
        """Take out the one used longest ago, whose places somebody needs."""
        return self._residents.pop(0) if len(self._residents) > int(spare_newest) else None

    def take_contained(self, tokens: Sequence[int]) -> list[Resident]:
        """Take out those that a longer one, of these tokens, makes needless."""
        contained = [r for r in self._residents if _begins_with(tokens, r.tokens)]
        for resident in contained:
            self._residents.remove(resident)
        return contained


def _begins_with(tokens: Sequence[int], prefix: tuple[int, ...]) -> bool:
    """Compares the last page first: where prompts differ, they differ there."""
    size = len(prefix)
    last = tuple(tokens[size - PAGE_TOKENS : size])
    return last == prefix[-PAGE_TOKENS:] and tuple(tokens[:size]) == prefix
