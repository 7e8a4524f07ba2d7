"""Frames that were encoded before: history that comes back costs nothing.

Owns a bounded map, least recently used out first. Knows nothing of how frames are encoded.
Locked; any thread.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from threading import Lock

MAX_TOKENS = 1 << 20


class EncodedFrames:
    """At most `max_tokens` token ids, at 4 bytes each, beside the keys."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._frames: OrderedDict[Hashable, array[int]] = OrderedDict()
        self._lock = Lock()

    def get_or_encode(self, key: Hashable, encode: Callable[[], Iterable[int]]) -> "array[int]":
        """The tokens kept under `key`, or those that `encode` returns now."""
        with self._lock:
            if key in self._frames:
                self._frames.move_to_end(key)
                return self._frames[key]
        tokens = array("I", encode())
        with self._lock:
            self._keep(key, tokens)
        return tokens

    def clear(self) -> None:
        """Forget all frames."""
        with self._lock:
            self._frames.clear()
            self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Token ids held now."""
        return self._num_tokens

    def _keep(self, key: Hashable, tokens: "array[int]") -> None:
        self._num_tokens += len(tokens) - len(self._frames.pop(key, ()))
        self._frames[key] = tokens
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= len(self._frames.popitem(last=False)[1])
