"""Prompts in flight that begin alike: one evaluates what they share, the others wait for it.

Side by side, each would take as long as both. Owns who waits for whom; the one ahead is asked for a
checkpoint where they part. Pure host code; engine thread only.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.sequence import Phase, Sequence

MIN_TOKENS = 2 * PAGE_TOKENS
"""Less is evaluated sooner than restored."""


class Lead(Struct, frozen=True):
    """A sequence on its way to `position`, up to which another one has the same tokens."""

    sequence: Sequence
    position: int

    @property
    def is_coming(self) -> bool:
        """Whether it still is: it may have passed, or have been cancelled or sent back."""
        ahead = self.sequence
        on_its_way = ahead.slot >= 0 and ahead.phase in (Phase.RESTORING, Phase.PREFILL)
        return on_its_way and ahead.num_evaluated < self.position


class Siblings:
    """Who waits for whom."""

    def __init__(self) -> None:
        self._leads: WeakKeyDictionary[Sequence, Lead] = WeakKeyDictionary()

    def follow_one(
        self, sequence: Sequence, running: Iterable[Sequence], start: int, strict: bool
    ) -> bool:
        """Let a sequence, which could go on from `start` now, wait for another one if that is
        further on their common way; the other will take a checkpoint where they part.

        Args:
            strict: wait only for what prompt evaluation makes.
        """
        if sequence.is_idle_work:
            return False
        ahead = [other for other in running if _is_ahead(other, sequence, start, strict)]
        leads = [Lead(other, _shared(sequence, other)) for other in ahead]
        leads = [lead for lead in leads if lead.is_coming and lead.position >= start + MIN_TOKENS]
        if not leads:
            return False
        best = max(leads, key=lambda lead: lead.position)
        best.sequence.want_checkpoint(best.position)
        self._leads[sequence] = best
        return True

    def awaits(self, sequence: Sequence) -> bool:
        """Whether a sequence still has something to wait for."""
        lead = self._leads.get(sequence)
        return lead is not None and lead.is_coming


def _is_ahead(other: Sequence, sequence: Sequence, start: int, strict: bool) -> bool:
    """Idle work stands still while anyone else runs, and who waits is nobody to wait for."""
    if other is sequence or other.is_idle_work or not other.is_kept:
        return False
    if strict and other.born != "prompt":
        return False
    if other.phase is Phase.PREFILL:
        return other.num_evaluated >= start
    is_moving = other.restoring is not None or other.writing is not None
    return is_moving and other.found is not None and other.found.position >= start


def _shared(sequence: Sequence, other: Sequence) -> int:
    limit = sequence.cached_limit // PAGE_TOKENS * PAGE_TOKENS
    return min(sequence.timeline.shared_with(other.timeline), limit)
