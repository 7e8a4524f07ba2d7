"""Sequences whose pages lie on the device, for the next of their kind, and places to go on from.

Owns the list of those that have ended, or that others left; the numbers of pages and slots are the
scheduler's. Who goes on from one shares its pages and copies its state. Engine thread only.
"""

from typing import Any, Literal

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth

Holder = Literal["sequence", "resident", "inner"]


class Branch(Struct, frozen=True, kw_only=True):
    """A prefix on the device: the pages of all its tokens, and the slot of the state after them.

    `trail` knows what the pages are called in the store; see `Snapshot` for the rest. `holder` has
    the slot: a sequence that runs, one of the `Residents`, or of the `InnerStates`.
    """

    pages: tuple[int, ...]
    slot: int
    born: Birth
    num_grid_pages: int
    trail: Any
    holder: Holder

    @property
    def position(self) -> int:
        """Tokens of the prefix, a multiple of PAGE_TOKENS."""
        return len(self.pages) * PAGE_TOKENS


class Resident(Struct):
    """A branch that belongs to no sequence, and its tokens; the number of the last request that had
    come when it was used."""

    tokens: list[int]
    branch: Branch
    last_visit: int


class Residents:
    """At most so many as are allowed, and as leave places to who needs them; last used last."""

    def __init__(self) -> None:
        self._residents: list[Resident] = []

    def __len__(self) -> int:
        return len(self._residents)

    def add(self, resident: Resident) -> None:
        """Add the one that was used last."""
        self._residents.append(resident)

    def find(self, tokens: list[int], limit: int, strict: bool) -> Branch | None:
        """The longest that `tokens` begin with, of at most `limit` tokens; `strict`: born by prompt
        evaluation."""
        fitting = [
            resident
            for resident in self._residents
            if may_go_on(resident.branch.position, resident.branch.born, limit, strict)
            and _begins_with(tokens, resident.tokens)
        ]
        best = max(fitting, key=lambda resident: resident.branch.position, default=None)
        return None if best is None else best.branch

    def touch(self, branch: Branch, visit: int) -> None:
        """It is used now."""
        found = [resident for resident in self._residents if resident.branch is branch]
        for resident in found:
            resident.last_visit = visit
        self._residents = [r for r in self._residents if r.branch is not branch] + found

    def take(self, branch: Branch) -> Branch | None:
        """Take one out, if it is here still."""
        found = [resident for resident in self._residents if resident.branch is branch]
        self._residents = [r for r in self._residents if r.branch is not branch]
        return found[0].branch if found else None

    def oldest(self) -> Resident | None:
        """The one used longest ago, unless it is the only one."""
        return self._residents[0] if len(self._residents) > 1 else None

    def take_oldest(self, spare_newest: bool = False) -> Branch | None:
        """Take out the one used longest ago, whose places somebody needs."""
        if len(self._residents) <= int(spare_newest):
            return None
        return self._residents.pop(0).branch

    def take_contained(self, tokens: list[int], spared: set[int]) -> list[Branch]:
        """Take out those that a longer one, of these tokens, makes needless, but for those of
        `spared` lengths."""
        contained = [
            resident.branch
            for resident in self._residents
            if _begins_with(tokens, resident.tokens) and resident.branch.position not in spared
        ]
        self._residents = [r for r in self._residents if r.branch not in contained]
        return contained


def _begins_with(tokens: list[int], prefix: list[int]) -> bool:
    """Compares the last page first: where prompts differ, they differ there."""
    size = len(prefix)
    last = tokens[size - PAGE_TOKENS : size]
    return last == prefix[-PAGE_TOKENS:] and tokens[:size] == prefix


def may_go_on(position: int, born: Birth, limit: int, strict: bool) -> bool:
    """Whether a sequence of this limit may go on from a state that it begins like."""
    return position <= limit and (born == "prompt" or not strict)
