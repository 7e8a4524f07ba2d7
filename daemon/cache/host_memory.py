"""Payloads kept in memory beside the disk, so that what is in use is restored without reading.

Owns a byte-bounded map by key of page or state, the least recently used going first. What is here
was written or read and verified before. Not thread-safe: `transfer` guards it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from daemon.checkpoint import HostBytes


class HostMemory:
    """The memory tier; with `max_bytes` 0 it holds nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._lent_bytes = 0
        self._payloads: OrderedDict[bytes, HostBytes] = OrderedDict()

    def find(self, key: bytes) -> HostBytes | None:
        """A payload, which counts as used by that."""
        payload = self._payloads.get(key)
        if payload is not None:
            self._payloads.move_to_end(key)
        return payload

    def holds(self, key: bytes) -> bool:
        """Whether a payload is here."""
        return key in self._payloads

    def keep(self, payloads: Mapping[bytes, HostBytes]) -> None:
        """Take payloads in, or count them as used; older ones make room."""
        for key, payload in payloads.items():
            self._remove(key)
            self._payloads[key] = payload
            self.num_bytes += memoryview(payload).nbytes
        self.make_room(0)

    def lend(self, num_bytes: int) -> None:
        """Of what may be kept here, so much lies elsewhere."""
        self._lent_bytes = num_bytes
        self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Let older payloads go now, for so many bytes that will be kept soon: the buffers that
        they are read into may be those of payloads that went."""
        while self._payloads and self.num_bytes + num_bytes > self._max_bytes - self._lent_bytes:
            self._remove(next(iter(self._payloads)))

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forget payloads; keys that are not here are ignored."""
        for key in keys:
            self._remove(key)

    def _remove(self, key: bytes) -> None:
        payload = self._payloads.pop(key, None)
        if payload is not None:
            self.num_bytes -= memoryview(payload).nbytes
