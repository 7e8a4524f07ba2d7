"""Responses that clients may fetch, delete and go on from.

Owns a bounded map in memory, the least recently used out first; a restart forgets it.
Locked; any thread.
"""

from collections import OrderedDict
from threading import Lock

from msgspec import Struct

from daemon.text.messages import Message

MAX_RESPONSES = 1024
MAX_BYTES = 256 * 2**20


class StoredResponse(Struct, frozen=True):
    """A response as it was answered, and the conversation up to its end without instructions."""

    body: bytes
    messages: tuple[Message, ...]
    num_bytes: int
    session: str = ""


class ResponseStore:
    """At most `max_responses`, of `max_bytes` of requests and answers together."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    def find(self, response_id: str) -> StoredResponse | None:
        """The response, which counts as used."""
        with self._lock:
            found = self._responses.get(response_id)
            if found is not None:
                self._responses.move_to_end(response_id)
            return found

    def keep(self, response_id: str, response: StoredResponse) -> None:
        """Keep a response, at the cost of those unused for longest."""
        with self._lock:
            self._drop(response_id)
            self._responses[response_id] = response
            self._num_bytes += response.num_bytes
            while len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes:
                self._drop(next(iter(self._responses)))

    def delete(self, response_id: str) -> bool:
        """Whether there was such a response; now there is none."""
        with self._lock:
            return self._drop(response_id)

    def forget(self, session: str) -> None:
        """Forget all responses of a session."""
        with self._lock:
            for key in [k for k, kept in self._responses.items() if kept.session == session]:
                self._drop(key)

    def _drop(self, response_id: str) -> bool:
        gone = self._responses.pop(response_id, None)
        if gone is not None:
            self._num_bytes -= gone.num_bytes
        return gone is not None
