"""Where checkpoints are taken and which go first. Pure functions over plain values.

Owns the choices, none of the doing: no store, no clock, no thread.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TypeVar

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Birth, Boundary, Reason

WORTH: dict[Reason, int] = {
    "mark": 6, "system": 5, "prompt": 4, "junction": 3, "user": 2, "tool": 1,
    "reply": 1, "interrupted": 1, "interval": 0,
}  # fmt: skip
"""How much a checkpoint is worth by its reason; where two reasons meet, the worthier is recorded.

A system prompt serves every session; an interval only prompts that were edited in mid-air.
"""


class Candidate(Struct, frozen=True):
    """What is weighed of a checkpoint; times in microseconds."""

    key: bytes
    reason: Reason
    born: Birth
    position: int
    used_us: int


def positions(
    num_prompt_tokens: int, boundaries: Sequence[Boundary], start: int, interval_tokens: int
) -> dict[int, Reason]:
    """Positions of a prompt, after `start`, where a checkpoint has meaning, in ascending order.

    Boundaries are aligned down to whole pages. Multiples of `interval_tokens` cover the stretches
    between them, wherever no boundary lies within half of that distance; being absolute, they are
    the same in every prompt with the same beginning.
    """
    assert interval_tokens > 0
    assert interval_tokens % PAGE_TOKENS == 0
    wanted: dict[int, Reason] = {}
    for boundary in boundaries:
        assert 0 <= boundary.position <= num_prompt_tokens
        position = boundary.position // PAGE_TOKENS * PAGE_TOKENS
        rival = wanted.get(position, boundary.reason)
        wanted[position] = max(rival, boundary.reason, key=WORTH.__getitem__)
    with_meaning = sorted(wanted)
    half = interval_tokens // 2
    for position in range(interval_tokens, num_prompt_tokens + 1, interval_tokens):
        neighbour = bisect_right(with_meaning, position - half)
        if neighbour == len(with_meaning) or with_meaning[neighbour] >= position + half:
            wanted[position] = "interval"
    return {position: wanted[position] for position in sorted(wanted) if position > max(start, 0)}


Row = TypeVar("Row", bound=Candidate)


def eviction_order(stored: Iterable[Row]) -> list[Row]:
    """Stored checkpoints, the first to go first: least recently used, then least worth.

    Only the checkpoint that a request restored counts as used, not those on its way there: these
    are kept alive by need alone.
    """
    return sorted(stored, key=lambda row: (row.used_us, WORTH[row.reason], -row.position))


def drop_order(queued: Iterable[Row]) -> list[Row]:
    """Checkpoints that wait to be written, the first to give up first: least worth, oldest."""
    return sorted(queued, key=lambda row: (WORTH[row.reason], row.used_us))
