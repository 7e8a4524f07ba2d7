"""Where checkpoints are taken and which go first. Pure functions over plain values.

Owns the choices, none of the doing: no store, no clock, no thread.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Boundary, Reason

WORTH: dict[Reason, int] = {
    "mark": 7, "system": 6, "prompt": 5, "user": 4, "junction": 3, "tool": 2,
    "reply": 1, "interrupted": 1, "interval": 0, "section": -1,
    "head": -2,
}  # fmt: skip
"""Which reason is recorded where several meet, and which checkpoints of a prompt stay when it would
take too many. How long a stored one is kept is another matter: see `keep_score`."""

ATTENTION_TOKENS = 131_072
"""With so many tokens before it, a token costs twice the first one: attention then takes as long as
all else. 27B: 54 GFLOP a token, and 16 layers x 24 heads x 256 dims x 4 FLOP for each one before.
"""

COVER_SHARE = 2
"""The cover's states take at most 1/2 of the bytes that the keys and values between them do."""

PROMPT_SHARE = 4
"""One prompt takes at most 1/4 of the budget for its states."""

TAIL_SPREAD: dict[Reason, int] = {"tool": 4, "user": 8}
"""At distance d from a prompt's end, checkpoints of these reasons are d / spread apart or more, if
they would be more than a quarter of those that the prompt may take."""

MAX_COVER_TOKENS = 8192

SECTION_SHARE = 8
"""Checkpoints inside messages are 1/8 of the cover's distance apart or more: they lie in memory,
where they make room for others, until somebody goes on from one."""

AGE_US = 60 * 1_000_000
"""The chance that a checkpoint is used again falls with 1 / (1 + age / 1 minute)²."""

SUPERSEDED_PENALTY = 8.0
"""In powers of two. Of all requests that go on from a conversation, 1 in 15 goes back to before its
end, mostly by a page, and these spread over everything that is superseded."""

SUPERSEDED_SHARE = 128
"""See `is_worth_writing`. With 16 in its place, a fifth fewer bytes are written, and one edit in a
hundred costs more than 64 tokens."""

EXPECTED_USE: dict[Reason, float] = {
    "mark": 3.0, "system": 3.0, "prompt": 1.0, "junction": 1.0, "user": 0.0, "reply": 0.0,
    "interrupted": 0.0, "tool": -1.0, "interval": -1.0, "section": -2.0,
    "head": -8.0,
}  # fmt: skip
"""In powers of two: how much likelier than others a checkpoint is used again, by its reason."""

LAZY_REASONS: frozenset[Reason] = frozenset({"tool", "interval", "junction"})
UNUSED_REASONS: tuple[Reason, ...] = ("head", "section")
FREE_SHARE = 0.5
MAX_COMPARED = 64


class Sizes(Struct, frozen=True):
    """Bytes on disk of a state and of a page of keys and values, and the budget for both.

    `interval_tokens` is the distance of checkpoints that are there for cover alone, a multiple of
    64, where somebody has an opinion on it.
    """

    state_bytes: int
    page_bytes: int
    budget_bytes: int
    interval_tokens: int | None = None

    @property
    def cover_tokens(self) -> int:
        """Distance of the checkpoints that are there for cover alone."""
        if self.interval_tokens is not None:
            return self.interval_tokens
        pages = -(-COVER_SHARE * self.state_bytes // self.page_bytes)
        return min(max(pages * PAGE_TOKENS, 4 * PAGE_TOKENS), MAX_COVER_TOKENS)

    @property
    def section_tokens(self) -> int:
        """Distance of the checkpoints inside messages."""
        return max(self.cover_tokens // SECTION_SHARE // PAGE_TOKENS, 1) * PAGE_TOKENS

    @property
    def max_position(self) -> int:
        """The longest prefix that fits the budget together with its state, in tokens."""
        return (self.budget_bytes - self.state_bytes) // self.page_bytes * PAGE_TOKENS

    @property
    def max_states(self) -> int:
        """Checkpoints that one prompt may take."""
        return max(self.budget_bytes // PROMPT_SHARE // self.state_bytes, 2)


class Prompt(Struct, frozen=True, kw_only=True):
    """What placement looks at. Evaluation begins at `start`; the first `num_shared` tokens (a
    multiple of 64) are those of an earlier prompt too, the longest such prefix that is known."""

    num_tokens: int
    boundaries: Sequence[Boundary]
    start: int = 0
    num_shared: int = 0


class Candidate(Struct, frozen=True, kw_only=True):
    """What is weighed of a stored checkpoint.

    `before` is the position of the nearest one before it, from which its loss would be made good;
    `num_bytes` what its removal frees; `heat` counts its uses, those before the last, at
    `used_us`, for less. `is_superseded`: one conversation has gone on past it, and no other. Where
    it was born by prompt evaluation, only those so born make good its loss, or supersede it.
    """

    reason: Reason
    position: int
    before: int
    num_bytes: int
    heat: float
    used_us: int
    is_superseded: bool


class Ranked(Struct, frozen=True, order=True):
    """A stored checkpoint in the order in which they go."""

    score: float
    key: bytes
    num_bytes: int


def evaluation_cost(start: int, stop: int) -> float:
    """What evaluating the tokens [start, stop) costs, in first tokens of a prompt."""
    return (stop - start) * (1 + (start + stop) / (2 * ATTENTION_TOKENS))


def heat_after_use(heat: float, used_us: int, now_us: int) -> float:
    """One more use, on top of what is left of the earlier ones."""
    return 1.0 + heat / (1.0 + _age(used_us, now_us)) ** 2


def keep_score(candidate: Candidate, now_us: int) -> float:
    """log2 of the cost that a byte saves, weighted by how likely it is used; the lowest goes first.

    Figures behind the constants: benchmarks/log/checkpoints.md.
    """
    saved = evaluation_cost(candidate.before, candidate.position)
    worth = math.log2(candidate.heat * saved / candidate.num_bytes)
    worth += EXPECTED_USE[candidate.reason]
    penalty = SUPERSEDED_PENALTY if candidate.is_superseded else 0.0
    return worth - 2.0 * math.log2(1.0 + _age(candidate.used_us, now_us)) - penalty


def is_lazy(reason: Reason, position: int, sizes: Sizes) -> bool:
    """Whether a checkpoint waits before it is written, because it is superseded soon, as a rule.

    The cover does not wait: it is what a long prompt goes on from when the daemon is killed.
    """
    return reason in LAZY_REASONS and position % sizes.cover_tokens != 0


def waits_for_use(reason: Reason) -> bool:
    """Whether a checkpoint stays in memory, unwritten, until it is used or the daemon stops: one of
    many places where the next conversation may part, of which it will take one."""
    return reason in UNUSED_REASONS


def is_worth_writing(candidate: Candidate, sizes: Sizes, pressure: float) -> bool:
    """Whether a checkpoint is worth its bytes on disk, or only the memory that it is in.

    A superseded one must save more than 1/128 of the cover's distance, on a large model a page: it
    loses nobody more than 64 tokens. When half of the day's allowance is spent (`pressure` 0.5),
    every one must save 64 tokens, and twice as many with each further 1/16; when all is spent, none
    is.
    """
    num_saved = candidate.position - candidate.before
    if candidate.is_superseded and num_saved <= sizes.cover_tokens // SUPERSEDED_SHARE:
        return False
    if pressure < FREE_SHARE:
        return True
    saved = evaluation_cost(candidate.before, candidate.position)
    return pressure < 1.0 and saved >= PAGE_TOKENS * 2.0 ** (16 * (pressure - FREE_SHARE))


def choose_victim(ascending: Sequence[Ranked], need_bytes: int) -> Ranked:
    """Whose turn it is to go when `need_bytes` are wanted, of candidates in the order of scores.

    The lowest score; but where that frees more than is needed, of those that free enough the one
    that is missed least: a long conversation does not go for want of a few bytes.
    """
    first = ascending[0]
    if first.num_bytes <= need_bytes:
        return first
    enough = [ranked for ranked in ascending if ranked.num_bytes >= need_bytes]
    return min(enough, key=lambda ranked: ranked.score + math.log2(ranked.num_bytes))


def _age(used_us: int, now_us: int) -> float:
    """In units of AGE_US; a clock that was put back makes nothing younger than new."""
    return max(now_us - used_us, 0) / AGE_US


def positions(prompt: Prompt, sizes: Sizes) -> dict[int, Reason]:
    """Where a prompt, after `start`, should have checkpoints, in ascending order, with reasons.

    Sections and heads lie at boundaries so called, not nearer to anything than their distance.
    Boundaries are aligned down to whole pages. A junction lies where the
    prompt leaves an earlier one: its state passes by during this evaluation and serves the third
    prompt to branch there.
    """
    wanted = _with_meaning(prompt, sizes)
    split = prompt.num_shared
    if prompt.start < split < prompt.num_tokens // PAGE_TOKENS * PAGE_TOKENS:
        _want(wanted, split, "junction")
    for boundary in prompt.boundaries:
        # What goes back before a prompt's end goes back by a page, more often than not.
        one_before = boundary.position // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS
        if boundary.reason == "prompt" and one_before > 0:
            _want(wanted, one_before, "interval")
        # A short reply ends before the next page: it is gone on from behind the generation prompt.
        end = prompt.num_tokens // PAGE_TOKENS * PAGE_TOKENS
        if boundary.reason == "prompt" and end == one_before + 2 * PAGE_TOKENS:
            _want(wanted, end, "reply")
    wanted |= dict.fromkeys(_cover(prompt, sizes.cover_tokens, sorted(wanted)), "interval")
    wanted |= _inside_messages(prompt, sizes.section_tokens, sorted(wanted))
    possible = [p for p in wanted if max(prompt.start, 0) < p <= sizes.max_position]
    kept = sorted(possible, key=lambda position: (WORTH[wanted[position]], position))
    kept = kept[-sizes.max_states :]
    return {position: wanted[position] for position in sorted(kept)}


def _with_meaning(prompt: Prompt, sizes: Sizes) -> dict[int, Reason]:
    wanted: dict[int, Reason] = {}
    for boundary in _near_the_tail(prompt, sizes):
        assert 0 <= boundary.position <= prompt.num_tokens
        _want(wanted, boundary.position // PAGE_TOKENS * PAGE_TOKENS, boundary.reason)
    return wanted


def _want(wanted: dict[int, Reason], position: int, reason: Reason) -> None:
    wanted[position] = max(wanted.get(position, reason), reason, key=WORTH.__getitem__)


def _near_the_tail(prompt: Prompt, sizes: Sizes) -> list[Boundary]:
    """All boundaries but those of a reason that are many, which thin out towards the start."""
    counts = Counter(boundary.reason for boundary in prompt.boundaries)
    kept = []
    last: dict[Reason, int] = {}
    for boundary in sorted(prompt.boundaries, key=lambda b: b.position, reverse=True):
        if boundary.reason in UNUSED_REASONS:
            continue
        many = counts[boundary.reason] > sizes.max_states // 4
        spread = TAIL_SPREAD.get(boundary.reason) if many else None
        distance = prompt.num_tokens - boundary.position
        neighbour = last.get(boundary.reason)
        if spread and neighbour is not None and neighbour - boundary.position < distance / spread:
            continue
        last[boundary.reason] = boundary.position
        kept.append(boundary)
    return kept


def _cover(prompt: Prompt, distance: int, with_meaning: Sequence[int]) -> list[int]:
    """Multiples of one distance wherever nothing else lies within half of it.

    Being absolute, they are the same in all prompts with one beginning.
    """
    return [
        position
        for position in range(distance, prompt.num_tokens + 1, distance)
        if bisect_right(with_meaning, position - distance // 2)
        == bisect_left(with_meaning, position + distance // 2)
    ]


def _inside_messages(prompt: Prompt, distance: int, others: Sequence[int]) -> dict[int, Reason]:
    """Sections and heads that are so far from what was placed otherwise, and from one another.

    All from the first token on are gone through: so prompts with one beginning agree on them.
    """
    candidates: dict[int, Reason] = {}
    for inner in UNUSED_REASONS:
        pages = (b.position // PAGE_TOKENS for b in prompt.boundaries if b.reason == inner)
        candidates |= dict.fromkeys(pages, inner)
    bounds = (0, *others, prompt.num_tokens // PAGE_TOKENS * PAGE_TOKENS + distance)
    kept: dict[int, Reason] = {}
    last = 0
    for page in sorted(candidates):
        position = page * PAGE_TOKENS
        after = bisect_right(bounds, position)
        if bounds[after] - position >= distance <= position - max(last, bounds[after - 1]):
            kept[position] = candidates[page]
            last = position
    return kept
