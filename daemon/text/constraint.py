"""The allowed tokens of one reply, as it grows: thinking first, then a grammar or watched calls.

Owns the state of one reply. Used on one thread, the engine's; grammars compute their masks on
threads given to them, while the model evaluates the token before.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher

from daemon.errors import InvalidRequest, QwendError

SOURCE_LINE = re.compile(r"\s*\d+ \| |<state>")
PLACE = re.compile(r"^at \d+\(\d+\): ")
"""How the library shows a grammar, which is ours and not the client's."""

Mask = np.ndarray[Any, np.dtype[np.uint32]]
"""A bit a token: token i is bit i % 32 of word i // 32; 1: allowed."""


def mask_of(vocab_size: int, allowed: Iterable[int]) -> Mask:
    """Only `allowed`."""
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def mask_without(vocab_size: int, banned: Iterable[int]) -> Mask:
    """All but `banned`."""
    return ~mask_of(vocab_size, banned)


class Body(Protocol):
    """What constrains a reply after its thinking. See engine/constraint.py for the promises."""

    @property
    def failure(self) -> QwendError | None: ...

    def allowed(self) -> Mask | None: ...

    def advance(self, token: int) -> None: ...


class ReplyConstraint:
    """Thinking, then the body; either may be absent. Fulfils the engine's Constraint."""

    def __init__(self, thought: "Thought | None", body: Body | None) -> None:
        self._thought = thought
        self._body = body

    @property
    def failure(self) -> QwendError | None:
        """Why nothing can follow, if so."""
        return self._body.failure if self._body else None

    def allowed(self) -> Mask | None:
        """What the next token may be; None: anything."""
        if self._thought:
            return self._thought.allowed()
        return self._body.allowed() if self._body else None

    def advance(self, token: int) -> None:
        """`token` has been chosen."""
        if self._thought:
            self._thought.advance(token)
            if not self._thought.is_open:
                self._thought = None
        elif self._body:
            self._body.advance(token)


class Thought:
    """Thinking that ends by itself, or is led out after `max_tokens`.

    Args:
        way_out: the tokens that end it, the last of them `</think>`.
        mask: what may be thought; None: anything.
    """

    def __init__(
        self, max_tokens: int | None, way_out: Sequence[int], mask: Mask | None, vocab_size: int
    ) -> None:
        self.is_open = True
        self._max_tokens = max_tokens
        self._way_out = way_out
        self._mask = mask
        self._vocab_size = vocab_size
        self._num_tokens = 0

    def allowed(self) -> Mask | None:
        """The next word of the way out, once the tokens are used up."""
        if self._max_tokens is None or self._num_tokens < self._max_tokens:
            return self._mask
        forced = self._way_out[self._num_tokens - self._max_tokens]
        return mask_of(self._vocab_size, (forced,))

    def advance(self, token: int) -> None:
        """Count it, and see whether it ends the thinking."""
        self._num_tokens += 1
        self.is_open = token != self._way_out[-1]


class GrammarMask:
    """The tokens that a grammar allows, computed ahead. Owns `matcher`."""

    def __init__(self, matcher: LLMatcher, threads: Executor, vocab_size: int) -> None:
        self._matcher = matcher
        self._threads = threads
        self._mask: Mask = np.zeros(-(-vocab_size // 32), np.uint32)
        self._pending: Future[None] = threads.submit(self._compute)

    @property
    def failure(self) -> QwendError | None:
        """The library's limits; waits."""
        self._pending.result()
        if not self._matcher.is_error():
            return None
        return InvalidRequest(f"The grammar of the reply failed: {reason_of(self._matcher)}")

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow; waits."""
        self._pending.result()
        return self._matcher.is_stopped()

    def allowed(self) -> Mask | None:
        """Waits until the mask has been computed; None after a failure."""
        self._pending.result()
        return None if self._matcher.is_error() else self._mask

    def advance(self, token: int) -> None:
        """Go on with `token`, on another thread."""
        self._pending = self._threads.submit(self._consume, self._pending, token)

    def _consume(self, before: Future[None], token: int) -> None:
        before.result()  # it was queued earlier, so it has begun at least
        self._matcher.consume_token(token)
        self._compute()

    def _compute(self) -> None:
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)


class CallWatch:
    """Free text, in which every call keeps to its grammar.

    A call begins with its own token; the same letters spelled by other tokens are banned.

    Args:
        opening: the id and the text of `<tool_call>`.
        new_call: begins the grammar of one call.
        completions: tokens that begin with the rest of the tag, by how much of it is there.
    """

    def __init__(
        self,
        opening: tuple[int, str],
        new_call: Callable[[], GrammarMask],
        token_bytes: Callable[[int], bytes],
        completions: Mapping[int, Mask],
    ) -> None:
        self._opening, spelled = opening
        self._tag = spelled.encode()
        self._new_call = new_call
        self._token_bytes = token_bytes
        self._completions = completions
        self._call: GrammarMask | None = None
        self._tail = b""

    @property
    def failure(self) -> QwendError | None:
        """The library's limits."""
        return self._call.failure if self._call else None

    def allowed(self) -> Mask | None:
        """The call's mask inside a call; in text, all that spells no tag."""
        if self._call and not self._call.is_complete:
            return self._call.allowed()
        self._call = None
        return self._completions.get(len(self._tail))

    def advance(self, token: int) -> None:
        """Follow the text, and begin a call with its tag."""
        if self._call is None and token == self._opening:
            self._call, self._tail = self._new_call(), b""
        if self._call is not None:
            self._call.advance(token)
        else:
            self._tail = self._unfinished_tag(self._tail + self._token_bytes(token))

    def _unfinished_tag(self, text: bytes) -> bytes:
        sizes = range(min(len(text), len(self._tag) - 1), 0, -1)
        return next((text[-size:] for size in sizes if self._tag.startswith(text[-size:])), b"")


def reason_of(matcher: LLMatcher) -> str:
    """What the library says is wrong, in one line."""
    if matcher.get_error().startswith("NoExtension"):
        return "no text at all fulfils it"
    lines = takewhile(lambda line: not SOURCE_LINE.match(line), matcher.get_error().splitlines())
    return PLACE.sub("", " ".join(" ".join(lines).split()))[:500]
