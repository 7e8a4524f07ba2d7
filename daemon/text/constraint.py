"""The allowed tokens of one reply, as it grows: thinking first, then a grammar or watched calls.

Owns the state of one reply. Used on one thread, the engine's; grammars compute their masks on
threads given to them, while the model evaluates the token before.
"""

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from queue import SimpleQueue
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
    """The tokens that a grammar allows, computed ahead. Owns `matcher`.

    What the engine's thread does for a token is two uncontended locks and a queue's end: a Future
    would cost it more than the rest of its share.
    """

    def __init__(self, matcher: LLMatcher, threads: "MaskThreads", vocab_size: int) -> None:
        self._matcher = matcher
        self._threads = threads
        self._mask: Mask = np.zeros(-(-vocab_size // 32), np.uint32)
        self._busy = threading.Lock()  # held while a mask is being computed
        self._failure: QwendError | None = None
        self._is_complete = False

    @property
    def failure(self) -> QwendError | None:
        """The library's limits; waits."""
        with self._busy:
            return self._failure

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow; waits."""
        with self._busy:
            return self._is_complete

    def allowed(self) -> Mask | None:
        """Waits until the mask has been computed; None after a failure."""
        with self._busy:
            return None if self._failure else self._mask

    def begin(self) -> None:
        """Compute the first mask, on another thread."""
        self._busy.acquire()
        self._threads.run(self, None)

    def advance(self, token: int) -> None:
        """Go on with `token`, on another thread."""
        self._busy.acquire()
        self._threads.run(self, token)

    def compute(self, token: int | None) -> None:
        """Take the token, then compute the mask; on a mask thread."""
        try:
            if token is not None:
                self._matcher.consume_token(token)
            if not self._matcher.is_error():
                self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._is_complete = self._matcher.is_stopped()
            if self._matcher.is_error():
                self._failure = _failed(reason_of(self._matcher))
        except Exception as error:  # a library that breaks its promises ends this reply only
            self._failure = _failed(str(error))
        finally:
            self._busy.release()


class MaskThreads:
    """Threads that compute masks, in the order in which they are asked for."""

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[tuple[GrammarMask, int | None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"mask-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, grammar: GrammarMask, token: int | None) -> None:
        """Have `grammar` compute; returns at once."""
        self._jobs.put((grammar, token))

    def close(self) -> None:
        """End the threads once they have done what was asked."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            grammar, token = job
            grammar.compute(token)


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


def _failed(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The grammar of the reply failed: {reason}")


def reason_of(matcher: LLMatcher) -> str:
    """What the library says is wrong, in one line."""
    if matcher.get_error().startswith("NoExtension"):
        return "no text at all fulfils it"
    lines = takewhile(lambda line: not SOURCE_LINE.match(line), matcher.get_error().splitlines())
    return PLACE.sub("", " ".join(" ".join(lines).split()))[:500]
