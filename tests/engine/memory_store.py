"""A CheckpointStore in a dictionary: the seam's promises without hashes, threads or disk."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import takewhile

from daemon.checkpoint import PAGE_TOKENS, Birth, Boundary, Found, Reason, Snapshot

Tokens = tuple[int, ...]


class MemoryStore:
    """Keeps everything; `lose` makes a later load fail, as damage on disk would."""

    def __init__(self, interval: int = 1024) -> None:
        self.interval = interval
        self.num_wipes = 0
        self.states: dict[tuple[Tokens, Birth], tuple[Snapshot, Reason]] = {}
        self.pages: dict[tuple[Tokens, bool], bytes] = {}

    def expect(self, state_bytes: int, page_bytes: int, allocate: object) -> None:
        self.sizes = state_bytes, page_bytes

    def timeline(self, tokens: Sequence[int], session: str) -> "MemoryTimeline":
        return MemoryTimeline(self, list(tokens))

    def lose(self, tokens: Tokens, born: Birth) -> None:
        self.states[tokens, born] = (None, "interval")  # type: ignore[assignment]


class MemoryTimeline:
    def __init__(self, store: MemoryStore, tokens: list[int]) -> None:
        self.store = store
        self.tokens = tokens

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)

    def find(self, limit: int, strict: bool) -> Found | None:
        births: tuple[Birth, ...] = ("prompt",) if strict else ("prompt", "decode")
        for position in range(min(limit, len(self.tokens)) // PAGE_TOKENS * PAGE_TOKENS, 0, -64):
            for born in births:
                entry = self.store.states.get((tuple(self.tokens[:position]), born))
                if entry is not None:
                    return Found(position, born, entry[1])
        return None

    def load(self, found: Found) -> "Future[Snapshot | None]":
        future: Future[Snapshot | None] = Future()
        key = (tuple(self.tokens[: found.position]), found.born)
        snapshot, _ = self.store.states[key]
        if snapshot is None:
            del self.store.states[key]
            future.set_result(None)
            return future
        pages = {
            i: self.store.pages[self._page_key(i, snapshot.num_grid_pages)]
            for i in range(found.position // PAGE_TOKENS)
        }
        loaded = Snapshot(
            found.position, found.born, snapshot.num_grid_pages, snapshot.state, pages
        )
        future.set_result(loaded)
        return future

    def shared_with(self, other: "MemoryTimeline") -> int:
        pages = zip(_pages(self.tokens), _pages(other.tokens), strict=False)
        whole = takewhile(lambda pair: pair[0] == pair[1] and len(pair[0]) == PAGE_TOKENS, pages)
        return PAGE_TOKENS * len(list(whole))

    def name(self, position: int) -> bytes:
        return repr(self.tokens[:position]).encode()

    def trail(self, position: int, born: Birth, num_grid_pages: int) -> Tokens:
        return tuple(self.tokens[:position])

    def follow(self, trail: Tokens) -> None:
        assert trail == tuple(self.tokens[: len(trail)])

    def positions(self, boundaries: Sequence[Boundary], start: int) -> Mapping[int, Reason]:
        spaced = range(self.store.interval, len(self.tokens), self.store.interval)
        wanted: dict[int, Reason] = dict.fromkeys(spaced, "interval")
        meant = [b for b in boundaries if b.reason not in ("head", "section")]
        wanted |= {b.position // PAGE_TOKENS * PAGE_TOKENS: b.reason for b in meant}
        return {
            position: reason
            for position, reason in wanted.items()
            if position > start
            and (tuple(self.tokens[:position]), "prompt") not in self.store.states
        }

    def missing_pages(self, position: int, num_grid_pages: int) -> Sequence[int]:
        return [
            i
            for i in range(position // PAGE_TOKENS)
            if self._page_key(i, num_grid_pages) not in self.store.pages
        ]

    def save(self, snapshot: Snapshot, reason: Reason) -> None:
        for i, content in snapshot.pages.items():
            self.store.pages[self._page_key(i, snapshot.num_grid_pages)] = bytes(content)
        key = (tuple(self.tokens[: snapshot.position]), snapshot.born)
        self.store.states[key] = (snapshot, reason)

    def _page_key(self, index: int, num_grid_pages: int) -> tuple[Tokens, bool]:
        return tuple(self.tokens[: (index + 1) * PAGE_TOKENS]), index < num_grid_pages


def _pages(tokens: list[int]) -> list[list[int]]:
    return [tokens[start : start + PAGE_TOKENS] for start in range(0, len(tokens), PAGE_TOKENS)]
