"""Who waits for whom: a request whose beginning another one evaluates just now goes on from there.

Owns the leads: which sequence a waiting one follows, and to where. A lead is given up as soon as
the leader has passed that place, or will not come to it. Whoever leads runs already or waits ahead
of the follower, so that nobody waits in a circle. Host code only, no clock. Engine thread.
"""

from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.sequence import Phase, Sequence

BEFORE_REPLY = (Phase.WAITING, Phase.RESTORING, Phase.PREFILL)


class Lead(Struct, frozen=True):
    """`leader` evaluates what a follower begins with, up to `split`, a multiple of PAGE_TOKENS."""

    leader: Sequence
    split: int


def is_worth_waiting(num_saved: int, num_ahead: int, step_tokens: int) -> bool:
    """Whether to leave `num_saved` tokens to a leader that has `num_ahead` before it.

    A prompt beside another gets a page of each step of `step_tokens` at least: that is what its
    sequence forgoes meanwhile. Waiting costs the device nothing, and saves it those tokens.
    """
    num_steps = -(-num_ahead // step_tokens)
    return num_saved >= PAGE_TOKENS * num_steps > 0


class Followers:
    """The waiting sequences, each with its lead or none.

    Args:
        step_tokens: of prompts, in one step.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._leads: dict[Sequence, Lead | None] = {}

    def look(
        self,
        running: Iterable[Sequence],
        waiting: Iterable[Sequence],
        start_of: Callable[[Sequence], int],
    ) -> None:
        """Give leads to those who wait and have not looked for one yet, and to those who lost it.

        Args:
            waiting: in order.
            start_of: how many tokens a sequence could go on from now.
        """
        ahead = [sequence for sequence in running if _may_lead(sequence)]
        for sequence in waiting:
            if sequence not in self._leads or self._has_lost_lead(sequence):
                self._leads[sequence] = self._find(sequence, ahead, start_of)
            if _may_lead(sequence):
                ahead.append(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        """Those who follow somebody."""
        return (sequence for sequence, lead in self._leads.items() if lead is not None)

    def lead_of(self, sequence: Sequence) -> Lead | None:
        """Whom a waiting sequence follows, as of the last look."""
        return self._leads.get(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It waits no more, or from the beginning."""
        self._leads.pop(sequence, None)

    def splits(self, leader: Sequence) -> set[int]:
        """Where others leave a sequence which they follow, or followed at the last look."""
        leads = (lead for lead in self._leads.values() if lead is not None)
        return {lead.split for lead in leads if lead.leader is leader}

    def _has_lost_lead(self, sequence: Sequence) -> bool:
        lead = self._leads[sequence]
        return lead is not None and not self._holds(lead)

    def _holds(self, lead: Lead) -> bool:
        return lead.leader.phase in BEFORE_REPLY and self._start(lead.leader) < lead.split

    def _find(
        self, sequence: Sequence, ahead: list[Sequence], start_of: Callable[[Sequence], int]
    ) -> Lead | None:
        """The one that shares most, and of several the first."""
        if not sequence.is_kept:
            return None
        leads = sorted(self._leads_to(sequence, ahead), key=lambda lead: -lead.split)
        start = start_of(sequence) if leads else 0
        for lead in leads:
            num_ahead = self._num_ahead(lead, start_of)
            if is_worth_waiting(lead.split - start, num_ahead, self._step_tokens):
                lead.leader.want_checkpoint(lead.split)
                return lead
        return None

    def _leads_to(self, sequence: Sequence, ahead: list[Sequence]) -> Iterator[Lead]:
        limit = sequence.cached_limit // PAGE_TOKENS * PAGE_TOKENS
        for leader in ahead:
            shared = leader.timeline.shared_with(sequence.timeline)
            split = min(shared, limit, leader.reach)
            lead = Lead(leader, split)
            if self._holds(lead):
                yield lead

    def _start(self, leader: Sequence) -> int:
        """Where a sequence stands; while it waits, where it will begin."""
        lead = self._leads.get(leader)
        return leader.progress if lead is None else lead.split

    def _num_ahead(self, lead: Lead, start_of: Callable[[Sequence], int]) -> int:
        """Tokens to be evaluated until the leader comes to the split, its own leaders' included."""
        leader = lead.leader
        above = self._leads.get(leader)
        if above is not None:
            return lead.split - above.split + self._num_ahead(above, start_of)
        start = start_of(leader) if leader.phase is Phase.WAITING else leader.progress
        return lead.split - start


def _may_lead(sequence: Sequence) -> bool:
    """Idle work stands still while anybody waits; those who come take over what it has done."""
    before_reply = sequence.phase in BEFORE_REPLY
    return before_reply and sequence.is_kept and not sequence.is_idle_work
