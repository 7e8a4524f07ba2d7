"""Ways to place and evict checkpoints, played over prompts without a model: ours and others'.

Each contender is given prompts in order and says how many tokens of each it would not evaluate.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from benchmarks.coding_traces import MODEL, TraceRequest
from daemon.cache import policy
from daemon.cache.eviction import EvictionRound
from daemon.cache.prefix_index import PageRow, PrefixIndex
from daemon.cache.records import NO_PARENT, ON_GRID, StateHeader, Use
from daemon.cache.store import footprint
from daemon.checkpoint import PAGE_TOKENS, Reason

WRITE_DELAY_US = 10_000_000
UNUSED_BYTES = (2 << 30) // 4 + (8 << 30) // 4
"""What may wait in memory to be used: with 8 GiB of it, see `cache/holdings.py`."""


class Contender(Protocol):
    """Plays one store over one trace."""

    written_bytes: int

    def reused(self, request: TraceRequest) -> int:
        """Tokens of a prompt that are not evaluated; then keeps what it keeps of it."""
        ...


class Stored:
    """A store in memory: our index, a way to place checkpoints, and a way to choose who goes."""

    def __init__(self, sizes: policy.Sizes) -> None:
        self.sizes = sizes
        self.index = PrefixIndex()
        self.written_bytes = 0

    def reused(self, request: TraceRequest) -> int:
        found = self.index.find(request.hashes, request.num_tokens - 1, strict=True)
        if found is not None:
            self.index.touch(found.key, request.time_us)
        start = found.position if found else 0
        for position, reason in self.place(request, start).items():
            self._save(request, position, reason)
        self.make_room(request.time_us)
        return start

    def place(self, request: TraceRequest, start: int) -> dict[int, Reason]:
        raise NotImplementedError

    def make_room(self, now_us: int) -> None:
        raise NotImplementedError

    def _save(self, request: TraceRequest, position: int, reason: Reason) -> None:
        num_pages = position // PAGE_TOKENS
        chain_bytes = num_pages * footprint(self.sizes.page_bytes)
        if chain_bytes + footprint(self.sizes.state_bytes) > self.sizes.budget_bytes:
            return
        parent = NO_PARENT
        for number, hash in enumerate(request.hashes[:num_pages]):
            key = hash + ON_GRID
            if self.index.page(key) is None:
                self.index.add_page(PageRow(key, parent, self.sizes.page_bytes), number)
                self.written_bytes += self.sizes.page_bytes
            parent = key
        state = StateHeader(
            hash=request.hashes[num_pages - 1],
            born="prompt",
            reason=reason,
            variant=ON_GRID,
            fingerprint=MODEL,
            position=position,
            num_grid_pages=num_pages,
            session="",
            created_us=request.time_us,
            payload_bytes=self.sizes.state_bytes,
        )
        if self.index.state(state.key) is None:
            self.index.add_state(state, Use(used_us=request.time_us))
            self.saved(state)

    def saved(self, state: StateHeader) -> None:
        self.written_bytes += self.sizes.state_bytes


class Qwend(Stored):
    """Placement, eviction and the choice of what is written by `cache/policy.py`."""

    def __init__(self, sizes: policy.Sizes) -> None:
        super().__init__(sizes)
        self._waiting: dict[bytes, StateHeader] = {}

    def reused(self, request: TraceRequest) -> int:
        for state in list(self._waiting.values()):
            self._settle(state, request.time_us - state.created_us)
        self._give_up_unused(request.time_us)
        return super().reused(request)

    def saved(self, state: StateHeader) -> None:
        self._waiting[state.key] = state

    def _settle(self, state: StateHeader, age_us: int) -> None:
        """Write a state, or never write it, when it has waited long enough."""
        candidate = self.index.candidate(state.key)
        if candidate is not None:
            if policy.waits_for_use(state.reason) and candidate.heat <= 1.0:
                return
            if age_us < WRITE_DELAY_US and policy.is_lazy(state.reason, state.position, self.sizes):
                return
            if policy.is_worth_writing(candidate, self.sizes, 0.0):
                self.written_bytes += self.sizes.state_bytes
            else:
                self.index.remove_state(state.key)
        del self._waiting[state.key]

    def _give_up_unused(self, now_us: int) -> None:
        unused = [key for key, s in self._waiting.items() if policy.waits_for_use(s.reason)]
        for key in sorted(unused, key=lambda key: self._score(key, now_us))[: -self._max_unused]:
            self.index.remove_state(key)
            del self._waiting[key]

    def _score(self, key: bytes, now_us: int) -> float:
        candidate = self.index.candidate(key)
        return -math.inf if candidate is None else policy.keep_score(candidate, now_us)

    @property
    def _max_unused(self) -> int:
        return max(UNUSED_BYTES // self.sizes.state_bytes, 1)

    def place(self, request: TraceRequest, start: int) -> dict[int, Reason]:
        return policy.positions(
            policy.Prompt(
                num_tokens=request.num_tokens,
                boundaries=request.boundaries,
                start=start,
                num_shared=self.index.num_known(request.hashes) * PAGE_TOKENS,
            ),
            self.sizes,
        )

    def make_room(self, now_us: int) -> None:
        round = EvictionRound(self.index, now_us, lambda key: True)
        while self.index.num_bytes > self.sizes.budget_bytes:
            victim = round.next_victim(self.index.num_bytes - self.sizes.budget_bytes)
            assert victim is not None
            self.index.remove_state(victim)


class LeastRecentlyUsed(Qwend):
    """Our placement; what was used least recently goes, of equals the one further on."""

    def make_room(self, now_us: int) -> None:
        def last_use(state: StateHeader) -> tuple[int, int]:
            return self.index.use(state.key).used_us, -state.position

        while self.index.num_bytes > self.sizes.budget_bytes:
            self.index.remove_state(min(self.index.states, key=last_use).key)


class UniformGrid(LeastRecentlyUsed):
    """A checkpoint every 1,600 tokens, as a paged engine with blocks of that size keeps them."""

    def place(self, request: TraceRequest, start: int) -> dict[int, Reason]:
        first = start // 1600 * 1600 + 1600
        return dict.fromkeys(range(first, request.num_tokens + 1, 1600), "interval")


class LlamaPlacement(LeastRecentlyUsed):
    """A checkpoint every 8,192 tokens and at a prompt's end, where llama-server has them, in a
    store like ours."""

    def place(self, request: TraceRequest, start: int) -> dict[int, Reason]:
        end = request.num_tokens // PAGE_TOKENS * PAGE_TOKENS
        return dict.fromkeys([*range(start + 8192, end, 8192), end], "prompt")


class Slot(Struct):
    """A prompt as llama-server holds it: its pages, and positions that have a checkpoint."""

    hashes: Sequence[bytes]
    checkpoints: list[int]


class LlamaServer:
    """llama-server with one slot: checkpoints every 8,192 tokens and at the end of each prompt, at
    most 32; a prompt that shares less than half of the slot's has that one moved to host memory,
    whole, and the best match taken back from there. The slot itself costs nothing here.
    """

    MAX_CHECKPOINTS = 32
    MIN_STEP = 8192

    def __init__(self, sizes: policy.Sizes) -> None:
        self.sizes = sizes
        self.written_bytes = 0
        self._slot = Slot((), [])
        self._idle: list[Slot] = []

    def reused(self, request: TraceRequest) -> int:
        if shared(self._slot.hashes, request.hashes) * 2 < len(self._slot.hashes):
            self._swap(request)
        common = shared(self._slot.hashes, request.hashes) * PAGE_TOKENS
        limit = min(common, request.num_tokens - 1)
        start = max((c for c in self._slot.checkpoints if c <= limit), default=0)
        end = request.num_tokens // PAGE_TOKENS * PAGE_TOKENS
        kept = [c for c in self._slot.checkpoints if c <= start]
        made = [*range(start + self.MIN_STEP, end, self.MIN_STEP), end]
        self.written_bytes += sum(c > start for c in made) * self.sizes.state_bytes
        checkpoints = sorted({*kept, *made})[-self.MAX_CHECKPOINTS :]
        self._slot = Slot(request.hashes, checkpoints)
        return start

    def _swap(self, request: TraceRequest) -> None:
        if self._slot.hashes:
            self._idle.append(self._slot)
            self.written_bytes += len(self._slot.hashes) * self.sizes.page_bytes
        best = max(self._idle, key=lambda s: shared(s.hashes, request.hashes), default=None)
        self._slot = Slot((), [])
        if best is not None and shared(best.hashes, request.hashes):
            self._idle.remove(best)
            self._slot = best
        while sum(map(self._num_bytes, self._idle)) > self.sizes.budget_bytes:
            self._idle.pop(0)

    def _num_bytes(self, slot: Slot) -> int:
        pages = len(slot.hashes) * self.sizes.page_bytes
        return pages + len(slot.checkpoints) * self.sizes.state_bytes


def shared(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """How many first pages two prompts have in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


CONTENDERS: dict[str, type[Contender]] = {
    "qwend": Qwend,
    "our placement, LRU": LeastRecentlyUsed,
    "grid of 1,600, LRU": UniformGrid,
    "llama.cpp's places, LRU": LlamaPlacement,
    "llama-server, slot free": LlamaServer,
}
