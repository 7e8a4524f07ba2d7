"""One sequence's tokens as the store sees them: token positions in, keys out.

Owns the sequence's hash chain and the names of its pages. Fulfils the engine's Timeline without
importing it. Belongs to one sequence; engine thread only.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from msgspec import Struct

from daemon.cache import policy
from daemon.cache.prefix_hash import PrefixChain
from daemon.cache.records import NO_PARENT, ON_GRID, VARIANT_BYTES, PageHeader, StateHeader
from daemon.cache.records import state_key as key_of_state
from daemon.cache.transfer import Transfer
from daemon.cache.write_queue import QueuedPage, QueuedState
from daemon.checkpoint import PAGE_TOKENS, Birth, Boundary, Found, HostBytes, Reason, Snapshot


class Trail(Struct, frozen=True):
    """How a run came to its last page: enough to name the pages that follow."""

    num_pages: int
    last_variant: bytes
    born: Birth


class StoredTimeline:
    """Tokens and the checkpoints on their way.

    Pages computed on the grid are named by their tokens alone and shared by all. Other pages have
    bits of their own, so each run (from a start or a restore on) names them with a random variant;
    after a restore, the run goes on from the restored checkpoint's last page.

    Args:
        session: a hint for people, at most 256 bytes of utf-8.
        sizes: what a checkpoint of this model takes, and may take.
        now_us: the clock, microseconds since 1970.
    """

    def __init__(
        self,
        transfer: Transfer,
        fingerprint: bytes,
        tokens: Sequence[int],
        *,
        session: str,
        sizes: policy.Sizes,
        now_us: Callable[[], int],
    ) -> None:
        self._transfer = transfer
        self._fingerprint = fingerprint
        self._chain = PrefixChain(fingerprint, tokens)
        self._session = session
        self._sizes = sizes
        self._spares: bytes | None = None
        self._now_us = now_us
        self._num_revoked = transfer.num_revoked(fingerprint, session)
        self._start_run(0, ON_GRID, "prompt")

    def extend(self, tokens: Sequence[int]) -> None:
        """Append decoded tokens."""
        self._chain.extend(tokens)

    def find(self, limit: int, strict: bool) -> Found | None:
        """The longest usable checkpoint at a position <= limit; memory only."""
        with self._transfer.looking() as shelf:
            state = shelf.index.find(self._chain.hashes, limit, strict)
            self._spares = shelf.waiting_conversation(len(self._chain.hashes), state)
            return None if state is None else shelf.found(state)

    def load(self, found: Found) -> "Future[Snapshot | None]":
        """Read it on another thread, and go on from it."""
        num_pages = found.position // PAGE_TOKENS
        key = key_of_state(self._chain.hashes[num_pages - 1], found.born)
        state, future = self._transfer.load(key, self._chain.token_bytes(0, found.position))
        if state is not None:
            self._start_run(num_pages, state.variant, found.born)
        return future

    def shared_with(self, other: "StoredTimeline") -> int:
        """Tokens, in whole pages, that both begin with; two of one model."""
        mine, theirs = self._chain.hashes, other._chain.hashes
        # A hash names all tokens before: those that are equal end once, so search for the end.
        pages = range(min(len(mine), len(theirs)))
        return PAGE_TOKENS * bisect_left(pages, True, key=lambda i: mine[i] != theirs[i])

    def name(self, position: int) -> bytes:
        """The hash of the first `position` tokens, whole pages."""
        return self._hash_at(position)

    def trail(self, position: int, born: Birth, num_grid_pages: int) -> Trail:
        """What the pages up to `position` are called, for whoever goes on from them."""
        num_pages = position // PAGE_TOKENS
        return Trail(num_pages, self._variant(num_pages - 1, num_grid_pages), born)

    def follow(self, trail: Trail) -> None:
        """Go on from the pages of another timeline, which still lie on the device."""
        self._start_run(trail.num_pages, trail.last_variant, trail.born)

    def positions(self, boundaries: Sequence[Boundary], start: int) -> Mapping[int, Reason]:
        """Where, after `start`, a checkpoint is wanted: none that is as good is stored there.

        A sequence that goes on from a decoded state makes none that is better than another such.
        """
        with self._transfer.looking() as shelf:
            num_shared = shelf.index.num_known(self._chain.hashes)
        wanted = policy.positions(
            policy.Prompt(
                num_tokens=self._chain.num_tokens,
                boundaries=boundaries,
                start=start,
                num_shared=num_shared * PAGE_TOKENS,
            ),
            self._sizes,
        )
        births = self._transfer.births(self._hash_at(position) for position in wanted)
        worse: frozenset[Birth] = frozenset(() if self._born == "decode" else ("decode",))
        return {
            position: reason
            for (position, reason), stored in zip(wanted.items(), births, strict=True)
            if not stored - worse
        }

    def missing_pages(self, position: int, num_grid_pages: int) -> Sequence[int]:
        """Indices of the pages below `position` that `save` needs."""
        num_pages = position // PAGE_TOKENS
        num_present = self._transfer.num_present(
            num_pages, lambda index: self._page_key(index, num_grid_pages)
        )
        return range(num_present, num_pages)

    def save(self, snapshot: Snapshot, reason: Reason) -> None:
        """Queue for writing; findable at once, never waits. Nothing is kept of a session that was
        wiped meanwhile."""
        if self._transfer.num_revoked(self._fingerprint, self._session) != self._num_revoked:
            return
        num_pages = snapshot.position // PAGE_TOKENS
        assert snapshot.position == num_pages * PAGE_TOKENS > 0
        assert snapshot.born == "decode" or snapshot.num_grid_pages == num_pages
        header = StateHeader(
            hash=self._hash_at(snapshot.position),
            born=snapshot.born,
            reason=reason,
            variant=self._variant(num_pages - 1, snapshot.num_grid_pages),
            fingerprint=self._fingerprint,
            position=snapshot.position,
            num_grid_pages=snapshot.num_grid_pages,
            session=self._session,
            created_us=self._now_us(),
            payload_bytes=memoryview(snapshot.state).nbytes,
        )
        pages = [
            self._queued_page(index, header, payload)
            for index, payload in sorted(snapshot.pages.items())
        ]
        self._transfer.save(QueuedState(header, snapshot.state), pages, self._spares)

    def _queued_page(self, index: int, state: StateHeader, payload: HostBytes) -> QueuedPage:
        num_grid_pages = state.num_grid_pages
        header = PageHeader(
            hash=self._chain.hashes[index],
            variant=self._variant(index, num_grid_pages),
            parent=self._page_key(index - 1, num_grid_pages) if index else NO_PARENT,
            fingerprint=self._fingerprint,
            index=index,
            tokens=self._chain.page_tokens(index),
            created_us=state.created_us,
            payload_bytes=memoryview(payload).nbytes,
        )
        return QueuedPage(header, payload)

    def _start_run(self, num_pages: int, last_variant: bytes, born: Birth) -> None:
        self._num_restored_pages = num_pages
        self._last_restored_variant = last_variant
        self._born = born
        self._run_variant = ON_GRID
        while self._run_variant == ON_GRID:
            self._run_variant = os.urandom(VARIANT_BYTES)

    def _hash_at(self, position: int) -> bytes:
        return self._chain.hashes[position // PAGE_TOKENS - 1]

    def _page_key(self, index: int, num_grid_pages: int) -> bytes:
        return self._chain.hashes[index] + self._variant(index, num_grid_pages)

    def _variant(self, index: int, num_grid_pages: int) -> bytes:
        if index < num_grid_pages:
            return ON_GRID
        # The last restored page stands for those before it: where it is stored, they are.
        if index == self._num_restored_pages - 1:
            return self._last_restored_variant
        return self._run_variant
