"""The prompts of the last requests, and which of them a new one is most like.

Owns a bounded memory of token timelines, each a prompt and its reply; forgets the least recent
first. Knows no store and no engine. Locked; any thread.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash
from msgspec import Struct

MAX_TOKENS = 1 << 22
MAX_PROMPTS = 256
PAGE_TOKENS = 64
GRAM_TOKENS = 8
"""So many tokens in a row that an earlier prompt has too are no coincidence."""

_FINALISTS = 4

PastState = Literal[
    "running",  # it is still being answered
    "ended",  # all of it was evaluated
    "cancelled",  # it ended before its time
    "stored",  # of an earlier run of the daemon, read back from the store
]

Tokens = np.ndarray[Any, np.dtype[np.uint32]]


class PastPrompt(Struct, frozen=True, kw_only=True):
    """A request's timeline. `tokens` `[n]` are the prompt's `num_prompt` and the reply's.

    The first `num_evaluated` have been evaluated, for it or before it. `model` is "" for the one
    that is served. `began_s` is Unix time.
    """

    id: str
    session: str
    tokens: Tokens
    num_prompt: int
    began_s: float
    num_evaluated: int = 0
    state: PastState = "running"
    model: str = ""


class Nearest(Struct, frozen=True):
    """The most similar earlier timeline, how many tokens both begin with, and how many of a new
    prompt's tokens stand nowhere in it."""

    past: PastPrompt
    num_common: int
    num_new: int


class _Entry:
    """A timeline with what makes it quick to compare."""

    def __init__(self, past: PastPrompt, shape: "FrameShape") -> None:
        self.past = past
        self.hashes = page_hashes(past.tokens)
        self.frames = frozenset(shape.spans(past.tokens))


class _Match(Struct, frozen=True):
    """How much a timeline has in common with a prompt: tokens they begin with, and tokens of
    frames behind these."""

    past: PastPrompt
    num_common: int
    num_shared: int


class FrameShape(Struct, frozen=True):
    """How frames look as tokens: the one that begins each, and those that end it."""

    start: int
    end: tuple[int, ...]

    def starts(self, tokens: Tokens) -> list[int]:
        """Where frames begin."""
        found: list[int] = np.flatnonzero(tokens == self.start).tolist()
        return found

    def spans(self, tokens: Tokens) -> dict[int, range]:
        """The tokens of each frame, by a hash that is the same whether or not it has its end."""
        starts = self.starts(tokens)
        content = tokens.tobytes()
        spans = {}
        for start, stop in pairwise([*starts, len(tokens)] if starts else []):
            end = self._stripped(tokens, start, stop)
            spans[xxhash.xxh3_64_intdigest(content[start * 4 : end * 4])] = range(start, stop)
        return spans

    def _stripped(self, tokens: Tokens, start: int, stop: int) -> int:
        size = len(self.end)
        is_whole = stop - size > start and tokens[stop - size : stop].tolist() == list(self.end)
        return stop - size if is_whole else stop


class PromptHistory:
    """At most `max_tokens` token ids, at 4 bytes each, of at most `max_prompts` timelines."""

    def __init__(
        self, shape: FrameShape, max_tokens: int = MAX_TOKENS, max_prompts: int = MAX_PROMPTS
    ) -> None:
        self.shape = shape
        self._max_tokens = max_tokens
        self._max_prompts = max_prompts
        self._num_tokens = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        """Token ids held now."""
        return self._num_tokens

    @staticmethod
    def tokens(tokens: Sequence[int]) -> Tokens:
        """Token ids in the form that is kept."""
        return np.asarray(tokens, np.uint32)

    def nearest(self, tokens: Sequence[int], session: str) -> Nearest | None:
        """The earlier timeline that a prompt has most in common with; the latest of equals.

        That is the one which it goes on from, if none is longer; else what counts is the common
        beginning and whole frames that stand in both. None when the history is empty, or what has
        been seen has neither a page nor a frame nor the session in common with the prompt.
        """
        prompt = np.asarray(tokens, np.uint32)
        with self._lock:
            entries = list(self._entries.values())
        spans = self.shape.spans(prompt)
        if spans:
            spans.popitem()  # the generation prompt, which all have
        hashes = page_hashes(prompt)
        matches = []
        for entry in _finalists(entries, hashes, spans.keys()):
            num_common = common_length(prompt, entry.past.tokens)
            frames = (spans[frame] for frame in entry.frames & spans.keys())
            shared = sum(len(frame) for frame in frames if frame.start >= num_common)
            if num_common >= PAGE_TOKENS or shared or entry.past.session == session:
                matches.append(_Match(entry.past, num_common, shared))
        if not matches:
            return None
        best = _best(matches)
        num_new = _num_new(prompt, best.past.tokens, best.num_common)
        return Nearest(best.past, best.num_common, num_new)

    def add(self, past: PastPrompt) -> None:
        """Remember a timeline. It takes the place of those that it begins with."""
        entry = _Entry(past, self.shape)
        with self._lock:
            for other in list(self._entries.values()):
                if _continues(entry, other):
                    known = max(entry.past.num_evaluated, other.past.num_evaluated)
                    entry.past = msgspec.structs.replace(entry.past, num_evaluated=known)
                    self._pop(other.past.id)
            self._put(entry)

    def end(
        self, request_id: str, reply: Sequence[int], state: PastState, num_evaluated: int
    ) -> None:
        """Record how a request ended: what was sampled, and how much of all was evaluated."""
        with self._lock:
            entry = self._entries.get(request_id)
        if entry is None:
            return
        tokens = np.concatenate((entry.past.tokens, np.asarray(reply, np.uint32)))
        known = max(entry.past.num_evaluated, num_evaluated)
        past = msgspec.structs.replace(entry.past, tokens=tokens, state=state, num_evaluated=known)
        ended = _Entry(past, self.shape)
        with self._lock:
            if request_id in self._entries:
                self._pop(request_id)
                self._put(ended)

    def timelines(self, session: str) -> list[bytes]:
        """The tokens of a session's timelines as frames would end them, little-endian u32."""
        end = np.asarray(self.shape.end, "<u4").tobytes()
        with self._lock:
            pasts = [entry.past for entry in self._entries.values()]
        own = [past for past in pasts if past.session == session]
        return [past.tokens.astype("<u4").tobytes() + end for past in own]

    def forget(self, session: str) -> None:
        """Forget all timelines of a session."""
        with self._lock:
            for entry in list(self._entries.values()):
                if entry.past.session == session:
                    self._pop(entry.past.id)

    def _put(self, entry: _Entry) -> None:
        self._entries[entry.past.id] = entry
        self._num_tokens += len(entry.past.tokens)
        while self._num_tokens > self._max_tokens or len(self._entries) > self._max_prompts:
            self._pop(next(iter(self._entries)))

    def _pop(self, request_id: str) -> None:
        self._num_tokens -= len(self._entries.pop(request_id).past.tokens)


def page_hashes(tokens: Tokens) -> list[int]:
    """A chain over whole pages: equal at i only if all tokens up to there are equal."""
    content = tokens.astype("<u4", copy=False).tobytes()
    hashes, link = [], 0
    for start in range(0, len(tokens) // PAGE_TOKENS * PAGE_TOKENS * 4, PAGE_TOKENS * 4):
        link = xxhash.xxh3_64_intdigest(content[start : start + PAGE_TOKENS * 4], seed=link)
        hashes.append(link)
    return hashes


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    return int(differing[0]) if len(differing) else size


def _finalists(entries: Sequence[_Entry], hashes: list[int], frames: Any) -> list[_Entry]:
    """Those worth a comparison token by token, the oldest first."""
    recent = set(range(len(entries) - _FINALISTS, len(entries)))
    by_pages = sorted(
        range(len(entries)), key=lambda i: (_num_common_pages(hashes, entries[i].hashes), i)
    )
    by_frames = sorted(range(len(entries)), key=lambda i: (len(entries[i].frames & frames), i))
    chosen = recent.union(by_pages[-_FINALISTS:], by_frames[-_FINALISTS:])
    return [entries[i] for i in sorted(chosen) if i >= 0]


def _best(matches: Sequence[_Match]) -> _Match:
    """See `PromptHistory.nearest`; matches come the oldest first."""
    longest = max(reversed(matches), key=lambda match: match.num_common)
    if longest.num_common == len(longest.past.tokens):
        return longest
    return max(
        reversed(matches),
        key=lambda match: (match.num_common + match.num_shared, match.num_common),
    )


def _num_common_pages(one: Sequence[int], other: Sequence[int]) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high) // 2
        if one[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low


def _continues(entry: _Entry, other: _Entry) -> bool:
    tokens, begun = entry.past.tokens, other.past.tokens
    return (
        other.past.state in ("ended", "stored")
        and entry.past.model == other.past.model
        and len(begun) <= len(tokens)
        and _num_common_pages(entry.hashes, other.hashes) == len(other.hashes)
        and common_length(tokens, begun) == len(begun)
    )


def _num_new(prompt: Tokens, past: Tokens, num_common: int) -> int:
    """Tokens of a prompt in no run of GRAM_TOKENS that the earlier one has too."""
    num_rest = len(prompt) - num_common
    if num_common == len(past) or num_rest < GRAM_TOKENS or len(past) < GRAM_TOKENS:
        return num_rest
    is_known = np.isin(_grams(prompt[num_common:]), _grams(past))
    covered = np.zeros(num_rest + 1, np.int64)
    starts = np.flatnonzero(is_known)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + GRAM_TOKENS, -1)
    return int(np.count_nonzero(np.cumsum(covered[:-1]) == 0))


def _grams(tokens: Tokens) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of each run of GRAM_TOKENS tokens, `[n - GRAM_TOKENS + 1]`."""
    count = len(tokens) - GRAM_TOKENS + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(GRAM_TOKENS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + count]
    return hashes
