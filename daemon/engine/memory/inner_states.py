"""States inside messages that stay on the device, for prompts that part from earlier ones there.

Owns the list of them, and who goes when there are too many; the numbers of slots and pages are the
scheduler's. Taking one costs a copy within the device, too little to ask where the next edit will
be; the store, to which each is a large record, gets one when it is used. Engine thread only, but
for `born`.
"""

from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth, Boundary, Reason
from daemon.engine.memory.residents import Branch, may_go_on

WEIGHT: dict[Reason, float] = {"head": 16.0, "section": 1.0}
"""How much likelier a prompt parts from an earlier one there."""

AGE = 4
"""After so many requests that went other ways, a state is worth half."""

NameOf = Callable[[int], bytes]
"""What a timeline calls its first so many tokens."""


class InnerState(Struct, eq=False):
    """`name` is that of its tokens. `before` is the nearest one that these begin with, from which
    its loss would be made good, and `last_visit` the number of the last prompt that went this way.
    """

    name: bytes
    branch: Branch
    reason: Reason
    before: "InnerState | None"
    last_visit: int

    @property
    def position(self) -> int:
        """Tokens before it."""
        return self.branch.position

    @property
    def num_saved(self) -> int:
        """Tokens that would be evaluated again without it."""
        return self.position - (0 if self.before is None else self.before.position)


def worth(reason: Reason, num_saved: int, age: int) -> float:
    """The tokens that a state saves, times how likely it is used `age` requests after the last one
    that went by it."""
    return WEIGHT[reason] * num_saved / (1 + age / AGE)


def inside(boundaries: Iterable[Boundary]) -> dict[int, Reason]:
    """The places inside the messages of a prompt, in whole pages, with reasons."""
    return {
        boundary.position // PAGE_TOKENS * PAGE_TOKENS: boundary.reason
        for boundary in boundaries
        if boundary.reason in WEIGHT
    }


class InnerStates:
    """At most as many as the scheduler has slots for.

    Attributes:
        num_visits: requests that were told of.
    """

    def __init__(self) -> None:
        self.num_visits = 0
        self._states: dict[bytes, InnerState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def born(self, name: bytes) -> Birth | None:
        """How the state after tokens of this name was born, if it is here; any thread."""
        state = self._states.get(name)
        return None if state is None else state.branch.born

    def has(self, name: bytes, born: Birth) -> bool:
        """Whether one as good as a state so born is here."""
        return self.born(name) in ("prompt", born)

    def find(self, name_of: NameOf, limit: int, strict: bool = False) -> InnerState | None:
        """The longest that a prompt begins with, of at most `limit` tokens; `strict`: born by
        prompt evaluation."""
        fitting = (
            state
            for state in self._on_the_way(name_of, limit)
            if may_go_on(state.position, state.branch.born, limit, strict)
        )
        return max(fitting, key=lambda state: state.position, default=None)

    def visit(self, name_of: NameOf, num_tokens: int) -> None:
        """A request of so many tokens goes this way: those on it stay longer than others."""
        self.num_visits += 1
        for state in self._on_the_way(name_of, num_tokens):
            state.last_visit = self.num_visits

    def add(
        self, name: bytes, branch: Branch, reason: Reason, before: InnerState | None
    ) -> InnerState:
        """Add one of tokens that none has yet."""
        assert name not in self._states
        state = InnerState(name, branch, reason, before, self.num_visits)
        self._states[name] = state
        return state

    def take(self, name: bytes) -> Branch | None:
        """Take out the one of these tokens, if it is here."""
        state = self._states.get(name)
        return None if state is None else self._take(state)

    def take_lesser(self, worth: float) -> Branch | None:
        """Take out the one that is worth least, unless that is more than `worth`.

        Where all are worth the same, each that goes makes the next one worth more: they thin out.
        """
        least = min(self._states.values(), key=self._worth, default=None)
        if least is None or self._worth(least) > worth:
            return None
        return self._take(least)

    def oldest(self) -> InnerState | None:
        """The last of those that a request went by longest ago."""
        return min(self._states.values(), key=lambda s: (s.last_visit, -s.position), default=None)

    def take_all(self) -> Iterator[Branch]:
        """Take out every one."""
        while self._states:
            yield self._states.popitem()[1].branch

    def _worth(self, state: InnerState) -> float:
        return worth(state.reason, state.num_saved, self.num_visits - state.last_visit)

    def _on_the_way(self, name_of: NameOf, limit: int) -> list[InnerState]:
        return [
            state
            for state in self._states.values()
            if state.position <= limit and name_of(state.position) == state.name
        ]

    def _take(self, state: InnerState) -> Branch:
        del self._states[state.name]
        for other in self._states.values():
            if other.before is state:
                other.before = state.before
        return state.branch
