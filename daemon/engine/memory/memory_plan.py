"""How the device's memory will be shared out: what a model takes there, and what context fits.

Arithmetic on numbers that others have measured; knows no device. Any thread.
"""

from collections.abc import Mapping

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.errors import OutOfDeviceMemory

WEIGHTS, STATES, PAGES, WORKSPACE = "weights", "states", "KV pages", "workspace"
"""The regions: what is read only, what sequences own, and what every step overwrites."""

CONTEXT_BYTES = 512 * 2**20
"""What CUDA itself is assumed to take of a card before anything of ours."""

MARGIN_BYTES = 256 * 2**20
"""Left free for what is in no region: kernels' code, recorded graphs, the tables of a prompt."""


INNER_SHARE = 2
"""States inside messages take at most 1/2 of what is free when all else has its place."""

MIN_INNER_STATES, MAX_INNER_STATES = 16, 256
"""Fewer than a tool result's beginning has pages help nobody."""


class Room(Struct, frozen=True):
    """What there is room for: pages, and slots of states inside messages."""

    num_pages: int
    num_inner_slots: int = 0


class WeightsOfFormat(Struct, frozen=True):
    """Tensors of one format, as the file has them."""

    format: str
    num_tensors: int
    num_bytes: int


class MemoryNeeds(Struct, frozen=True, kw_only=True):
    """What a model takes in bytes, however many pages there are; `formats` as in the file."""

    formats: tuple[WeightsOfFormat, ...]
    weights_bytes: int
    states_bytes: int
    workspace_bytes: int
    page_bytes: int
    num_slots: int

    @property
    def state_bytes(self) -> int:
        """One state."""
        return self.states_bytes // self.num_slots

    @property
    def fixed_bytes(self) -> int:
        """All but the pages."""
        return self.weights_bytes + self.states_bytes + self.workspace_bytes


class MemoryDemand(Struct, frozen=True, kw_only=True):
    """What is asked for: tokens of one sequence, how many sequences and states there are, and
    whether states inside messages are of use."""

    context_length: int
    num_sequences: int
    num_slots: int
    has_inner_states: bool = False

    @property
    def pages_each(self) -> int:
        """Pages of one sequence of full length."""
        return -(-self.context_length // PAGE_TOKENS)

    @property
    def least_pages(self) -> int:
        """One sequence of full length, and a page for another to wait in."""
        return self.pages_each + 1

    @property
    def most_pages(self) -> int:
        """All sequences at full length."""
        return self.pages_each * self.num_sequences + 1


class MemoryPlan(Struct, frozen=True, kw_only=True):
    """Needs, within a budget.

    Attributes:
        card: whose memory it is, for people.
        budget_bytes: what the regions may take, or None when no limit is known.
    """

    card: str
    demand: MemoryDemand
    needs: MemoryNeeds
    budget_bytes: int | None

    @property
    def required_bytes(self) -> int:
        """What must be there: everything, with pages for one sequence of full length."""
        return self.needs.fixed_bytes + self.demand.least_pages * self.needs.page_bytes

    @property
    def spare_bytes(self) -> int:
        """What the budget has beyond that, for further sequences; negative when it is too small."""
        return 0 if self.budget_bytes is None else self.budget_bytes - self.required_bytes

    @property
    def fits(self) -> bool:
        """Whether at least one sequence of full length has room."""
        return self.spare_bytes >= 0

    @property
    def num_pages(self) -> int:
        """Pages to reserve: for all sequences at full length, or as many as there is room for."""
        extra = max(0, self.spare_bytes) // self.needs.page_bytes
        return min(self.demand.least_pages + extra, self.demand.most_pages)

    @property
    def num_inner_slots(self) -> int:
        """States inside messages, beside pages for all sequences at full length."""
        if not self.demand.has_inner_states:
            return 0
        extra = self.num_pages - self.demand.least_pages
        free = max(0, self.spare_bytes - extra * self.needs.page_bytes)
        count = min(free // INNER_SHARE // self.needs.state_bytes, MAX_INNER_STATES)
        return count if count >= MIN_INNER_STATES else 0

    @property
    def room(self) -> Room:
        """What to reserve beside the weights and the sequences' states."""
        return Room(self.num_pages, self.num_inner_slots)

    @property
    def fitting_tokens(self) -> int | None:
        """The longest context of one sequence that has room; None when no limit is known."""
        if self.budget_bytes is None:
            return None
        pages = (self.budget_bytes - self.needs.fixed_bytes) // self.needs.page_bytes
        return max(0, pages - 1) * PAGE_TOKENS

    @property
    def regions(self) -> Mapping[str, int]:
        """Bytes of each region."""
        needs = self.needs
        return {
            WEIGHTS: needs.weights_bytes,
            STATES: needs.states_bytes + self.num_inner_slots * needs.state_bytes,
            PAGES: self.num_pages * needs.page_bytes,
            WORKSPACE: needs.workspace_bytes,
        }

    @property
    def summary(self) -> str:
        """Who owns what, in one line."""
        sizes = ", ".join(f"{name} {gibibytes(size)}" for name, size in self.regions.items())
        tokens = (self.num_pages - 1) * PAGE_TOKENS
        return f"memory of {self.card}: {sizes}; room for {tokens} tokens of context"

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            OutOfDeviceMemory: says what is missing, and what would fit.
        """
        if not self.fits:
            raise OutOfDeviceMemory(self._refusal())

    def _refusal(self) -> str:
        needs, budget = self.needs, max(0, self.budget_bytes or 0)
        if not self.fitting_tokens:
            return (
                f"weights, states and workspace take {gibibytes(needs.fixed_bytes)}, and "
                f"{self.card} has {gibibytes(budget)} for them: no context fits; use a smaller "
                "file or fewer --parallel"
            )
        return (
            f"a context of {self.demand.context_length} tokens does not fit {self.card}: "
            f"{gibibytes(-self.spare_bytes)} are missing; {self.fitting_tokens} tokens would fit: "
            "pass --ctx, fewer --parallel, or smaller KV formats (-ctk, -ctv)"
        )


def gibibytes(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.2f} GiB"
