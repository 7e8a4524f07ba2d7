"""A sequence without a model: payloads that say which tokens and which run they belong to."""

import os
from pathlib import Path
from typing import Any

import xxhash

from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.cache.timeline import StoredTimeline
from daemon.checkpoint import PAGE_TOKENS, Birth, Found, HostBytes, Reason, Snapshot

MODEL = b"a model of tests"
PAGE_BYTES = 96
STATE_BYTES = 700


def open_cache(
    path: Path,
    fingerprint: bytes = MODEL,
    *,
    budget_bytes: int = 64 << 20,
    interval_tokens: int = 1024,
    queue_bytes: int = 64 << 20,
    **limits: Any,
) -> CheckpointCache:
    return CheckpointCache.open(
        path,
        CacheLimits(
            budget_bytes=budget_bytes,
            interval_tokens=interval_tokens,
            queue_bytes=queue_bytes,
            **limits,
        ),
        fingerprint=fingerprint,
        model_name="tests",
    )


def prompt(num_pages: int, first: int = 0) -> list[int]:
    """Tokens of some pages; `first` tells prompts apart."""
    return [first, *range(1, num_pages * PAGE_TOKENS)]


def grid_bytes(kind: str, tokens: list[int], num_bytes: int) -> bytes:
    """What prompt evaluation makes: a function of the tokens."""
    seed = xxhash.xxh3_64_intdigest(kind.encode() + repr(tokens).encode())
    piece = xxhash.xxh3_128_digest(seed.to_bytes(8, "little"))
    return (piece * (num_bytes // 16 + 1))[:num_bytes]


class Simulated:
    """Plays the engine's part: evaluates pages, captures states, restores them."""

    def __init__(
        self,
        cache: CheckpointCache,
        tokens: list[int],
        session: str = "",
        page_bytes: int = PAGE_BYTES,
        state_bytes: int = STATE_BYTES,
    ) -> None:
        self.tokens = list(tokens)
        self.timeline: StoredTimeline = cache.timeline(tokens, session)
        self.born: Birth = "prompt"
        self.pages: list[HostBytes] = []
        self.num_grid_pages = 0
        self.page_bytes = page_bytes
        self.state_bytes = state_bytes

    def resume(self, limit: int | None = None, strict: bool = False) -> Found | None:
        """Restore the nearest checkpoint, from whichever tier; None when there is none, or none
        that can be read."""
        found = self.timeline.find(len(self.tokens) if limit is None else limit, strict)
        if found is None:
            return None
        snapshot = self.timeline.load(found).result(timeout=20)
        if snapshot is None:
            return None
        assert (snapshot.position, snapshot.born) == (found.position, found.born)
        assert list(snapshot.pages) == list(range(found.position // PAGE_TOKENS))
        self.born = snapshot.born
        self.num_grid_pages = snapshot.num_grid_pages
        self.pages = [bytes(page) for page in snapshot.pages.values()]
        self.state = bytes(snapshot.state)
        return Found(found.position, found.born, found.reason)

    def prefill(self) -> None:
        """Evaluate the whole pages of all tokens."""
        for index in range(len(self.pages), len(self.tokens) // PAGE_TOKENS):
            if self.born == "prompt":
                self.num_grid_pages = index + 1
                self.pages.append(self.grid_page(index))
            else:
                self.pages.append(os.urandom(self.page_bytes))

    def decode(self, tokens: list[int]) -> None:
        """Evaluate more tokens one by one: pages with bits of their own."""
        self.tokens += tokens
        self.timeline.extend(tokens)
        self.born = "decode"
        while len(self.pages) < len(self.tokens) // PAGE_TOKENS:
            self.pages.append(os.urandom(self.page_bytes))

    def grid_page(self, index: int) -> bytes:
        return grid_bytes("page", self.tokens[: (index + 1) * PAGE_TOKENS], self.page_bytes)

    def snapshot(self, position: int) -> Snapshot:
        num_pages = position // PAGE_TOKENS
        num_grid_pages = min(self.num_grid_pages, num_pages)
        missing = self.timeline.missing_pages(position, num_grid_pages)
        if self.born == "prompt":
            state = grid_bytes("state", self.tokens[:position], self.state_bytes)
        else:
            state = os.urandom(self.state_bytes)
        pages = {index: self.pages[index] for index in missing}
        return Snapshot(position, self.born, num_grid_pages, state, pages)

    def save(self, position: int, reason: Reason = "interval") -> Snapshot:
        snapshot = self.snapshot(position)
        self.timeline.save(snapshot, reason)
        return snapshot


def saved_prompt(
    cache: CheckpointCache, num_pages: int, first: int = 0, session: str = ""
) -> Simulated:
    """A prompt that was evaluated and saved at its end."""
    sequence = Simulated(cache, prompt(num_pages, first), session)
    sequence.prefill()
    sequence.save(num_pages * PAGE_TOKENS, "prompt")
    return sequence
