"""One token timeline inside the engine: its tokens, its places on the device, when it ends.

Owns no device memory, only the numbers of its slots and pages. Engine thread only.
"""

import enum
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any, get_args

import msgspec
import numpy as np

from daemon.checkpoint import PAGE_TOKENS, Birth, Found, Reason, Snapshot
from daemon.engine.backends.backend import SamplingRow, Writing
from daemon.engine.checkpointing import Timeline
from daemon.engine.memory.residents import Branch, Holder
from daemon.engine.requests import (
    Deliver,
    FinishReason,
    GenerationRequest,
    Priority,
    Probed,
    TokenLogprobs,
)
from daemon.errors import QwendError

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
NUM_PROBED = 20
"""Alternatives that a probe reports."""


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # no places on the device
    RESTORING = "restoring"  # a checkpoint is awaited, or on its way to the device
    PREFILL = "prefill"  # tokens are known that have not been evaluated
    DECODE = "decode"  # exactly the last sampled token has not been evaluated
    ENDED = "ended"  # no places any more


class Sequence:
    """`tokens` are prompt and reply; the first `num_evaluated` are in state and pages, of which
    `num_restored` came from a checkpoint when the sequence last began.

    `mark` is the position (a multiple of PAGE_TOKENS, 0: none) whose state lies in `mark_slot`:
    the last place on the grid that decoding passed, where a reply's checkpoint is cut. Before that,
    the slot has the state at `held`, the last one captured; `held_born` says how it came about.
    `branch` is what the sequence may go on from on the device: the first of its pages are those of
    the branch, and its slot has that state. `restoring` is a checkpoint that the store reads,
    `writing` one on its way to the device. At `junctions` others leave this sequence, who wait for
    it, and states may stay on the device `inside` its messages. `num_kept` tokens are covered by
    the checkpoints that this sequence saved.
    """

    def __init__(self, request: GenerationRequest, deliver: Deliver, timeline: Timeline) -> None:
        self.request = request
        self.deliver = deliver
        self.timeline = timeline
        self.constraint = request.constraint
        self.phase = Phase.WAITING
        self.tokens = list(request.tokens)
        self.num_evaluated = 0
        self.num_restored = 0
        self.num_cached = 0
        self.num_kept = 0
        self.num_grid_pages = 0
        self.born: Birth = "prompt"
        self.pages: tuple[int, ...] = ()
        self.slot = -1
        self.mark_slot = -1
        self.mark = 0
        self.held = 0
        self.held_born: Birth = "prompt"
        self.branch: Branch | None = None
        self.positions: Mapping[int, Reason] = {}
        self.inside: Mapping[int, Reason] = {}
        self.junctions: set[int] = set()
        self.found: Found | None = None
        self.restoring: Future[Snapshot | None] | None = None
        self.writing: Writing | None = None
        self.was_started = False
        self.follows_since_s: float | None = None
        self.prompt_ms = 0.0
        self.kept_ms = 0.0
        self.decode_ms = 0.0
        self.seed = _seed_of(request)
        self._counts: dict[int, tuple[int, int]] | None = None
        if _has_penalty(request):
            self._counts = {token: (n, 0) for token, n in Counter(request.tokens).items()}

    @property
    def num_prompt(self) -> int:
        """Tokens that the client sent."""
        return len(self.request.tokens)

    @property
    def reply(self) -> list[int]:
        """Tokens sampled so far."""
        return self.tokens[self.num_prompt :]

    @property
    def num_known(self) -> int:
        """Tokens of prompt and reply."""
        return len(self.tokens)

    @property
    def is_idle_work(self) -> bool:
        """Whether nobody waits for it."""
        return self.request.priority != "client"

    @property
    def rank(self) -> int:
        """How many kinds of work are more urgent."""
        return PRIORITIES.index(self.request.priority)

    @property
    def is_kept(self) -> bool:
        """Whether its evaluation starts from checkpoints and leaves some."""
        return self.request.priority != "audit"

    @property
    def is_arriving(self) -> bool:
        """Whether parts of its checkpoint have not reached the device."""
        return self.writing is not None and not self.writing.arrived.done()

    def want_checkpoint(self, position: int) -> None:
        """Another prompt parts from this one there."""
        self.junctions.add(position)
        self.plan_checkpoints(self.positions)

    def plan_checkpoints(self, positions: Mapping[int, Reason]) -> None:
        """Where to take checkpoints from now on."""
        junctions = [p for p in self.junctions if p > self.num_evaluated]
        self.positions = {**dict.fromkeys(junctions, "junction"), **positions}

    def inside_between(self, start: int, end: int) -> list[int]:
        """Places in `(start, end]` inside messages where no checkpoint is taken, in order."""
        places = (p for p in self.inside if start < p <= end and p not in self.positions)
        return sorted(places)

    def stop_restoring(self) -> None:
        """Its places will be somebody else's."""
        if self.writing is not None:
            self.writing.abandon()
        self.restoring = self.writing = None

    @property
    def goal(self) -> int:
        """Where evaluation of known tokens ends: at the last, or at the last checkpoint wanted."""
        if self.request.max_tokens:
            return self.num_known
        return max(self.positions, default=self.num_evaluated)

    @property
    def audit_positions(self) -> Mapping[int, Reason]:
        """Where an audit's state is kept on the device, for the next one of this conversation."""
        ends = {b.position // PAGE_TOKENS * PAGE_TOKENS: b.reason for b in self.request.boundaries}
        last = max((end for end in ends if 0 < end <= self.cached_limit), default=0)
        return {last: ends[last]} if last else {}

    @property
    def reach(self) -> int:
        """How far on the grid evaluation of known tokens will come."""
        return self.goal // PAGE_TOKENS * PAGE_TOKENS

    @property
    def progress(self) -> int:
        """Tokens that are evaluated, or will be as soon as a checkpoint has been restored."""
        if self.phase is not Phase.RESTORING:
            return self.num_evaluated
        if self.branch is not None:
            return self.branch.position
        return 0 if self.found is None else self.found.position

    @property
    def cached_limit(self) -> int:
        """The most tokens that may come from a checkpoint: one at least is evaluated."""
        return self.num_known - 1

    @property
    def num_pages_needed(self) -> int:
        """Pages for all known tokens."""
        return -(-self.num_known // PAGE_TOKENS)

    def unevaluated(self, limit: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The next tokens to evaluate, `[<= limit]`."""
        first = self.num_evaluated
        return np.asarray(self.tokens[first : first + limit], np.int32)

    def branches(self) -> Iterator[Branch]:
        """Where others may go on that begin like this one, while it runs."""
        if not self.is_kept:
            return
        done = self.num_evaluated
        has_state = self.phase is Phase.PREFILL and not self.is_arriving
        if has_state and done > 0 and done % PAGE_TOKENS == 0:
            yield self.branch_at(done, self.slot, self.born, "sequence")
        if self.held:
            yield self.branch_at(self.held, self.mark_slot, self.held_born, "sequence")

    def branch_at(self, position: int, slot: int, born: Birth, holder: Holder) -> Branch:
        """The first `position` tokens, whose state lies in `slot`."""
        num_pages = position // PAGE_TOKENS
        num_grid_pages = min(self.num_grid_pages, num_pages)
        return Branch(
            pages=self.pages[:num_pages],
            slot=slot,
            born=born,
            num_grid_pages=num_grid_pages,
            trail=self.timeline.trail(position, born, num_grid_pages),
            holder=holder,
        )

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens.append(token)
        self.timeline.extend([token])
        if self.constraint is not None:
            self.constraint.advance(token)
        if self._counts is not None:
            total, replied = self._counts.get(token, (0, 0))
            self._counts[token] = (total + 1, replied + 1)

    def finish_reason(self, context_length: int) -> FinishReason | None:
        """Whether the last sampled token ends the reply, and why."""
        if self.tokens[-1] in self.request.stop_tokens:
            return "stop"
        if self.num_known - self.num_prompt >= self.request.max_tokens:
            return "length"
        return "length" if self.num_known >= context_length else None

    def sampling_row(self) -> SamplingRow:
        """How to choose this sequence's next token; waits for its constraint."""
        step = self.num_known - self.num_prompt
        mask = None if self.constraint is None else self.constraint.allowed()
        params = self.request.sampling
        if self.request.probe and step == 0:
            num_alternatives = max(params.logprobs or 0, NUM_PROBED)
            params = msgspec.structs.replace(params, logprobs=num_alternatives)
        return SamplingRow(params, self.seed, step, self._counts or {}, mask)

    def probed(self, logprobs: TokenLogprobs | None) -> Probed | None:
        """What to report before the first token, if that was asked for."""
        if logprobs is None or not self.request.probe or self.reply:
            return None
        return Probed(self.num_restored, self.born, logprobs.alternatives[:NUM_PROBED])

    def asked_of(self, logprobs: TokenLogprobs | None) -> TokenLogprobs | None:
        """As many of the alternatives as the request asked for."""
        count = self.request.sampling.logprobs
        if logprobs is None or count is None:
            return None
        return TokenLogprobs(logprobs.chosen, logprobs.alternatives[:count])

    @property
    def failure(self) -> QwendError | None:
        """Why no token can follow, if so; known after `sampling_row`."""
        return None if self.constraint is None else self.constraint.failure


def _seed_of(request: GenerationRequest) -> int:
    if request.sampling.seed is not None:
        return request.sampling.seed
    return int.from_bytes(np.random.default_rng().bytes(8), "little")


def _has_penalty(request: GenerationRequest) -> bool:
    sampling = request.sampling
    neutral = (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    ) == (1.0, 0.0, 0.0)
    return not neutral
