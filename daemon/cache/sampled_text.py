"""Which tokens were sampled for a reply's text, so that history which comes back matches again.

Owns a bounded map from text to token ids, the least recently used going first; keeps no text, only
its hash and length. Any thread may call it; the transfer thread writes it to disk.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import xxhash

from daemon.cache.prefix_hash import TOKEN_BYTES
from daemon.cache.records import (
    SampledReply,
    decode_sampled,
    encode_sampled,
    sampled_bytes,
)

_TEXT_SUM_SEED = 1

Write = Callable[[Mapping[bytes, bytes | None]], None]
"""Takes records by key to write, None to delete; returns at once."""

AgedRecord = tuple[int, bytes]
"""When a reply was sampled, microseconds since 1970, and its record: token ids take less room so
than as numbers."""


def decode_aged(key: bytes, record: bytes) -> AgedRecord:
    """Check a record, and leave it as it is.

    Raises:
        DamagedRecord: see `decode_sampled`.
    """
    return decode_sampled(key, record).created_us, record


class SampledText:
    """Remembers what was sampled, for all models of a store; recalls for one.

    Args:
        records: what the store holds, by key.
        fingerprint: 16 bytes that name the model.
        max_bytes: of all records.
        write: where changes go.
    """

    def __init__(
        self,
        records: Mapping[bytes, AgedRecord],
        *,
        fingerprint: bytes,
        max_bytes: int,
        write: Write,
    ) -> None:
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._write = write
        self._lock = threading.Lock()
        self._records: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_bytes = 0
        changes: dict[bytes, bytes | None] = {}
        for key, (_, record) in sorted(records.items(), key=lambda item: item[1]):
            self._put(key, record)
        self._evict(changes)
        if changes:
            write(changes)

    def __len__(self) -> int:
        return len(self._records)

    def recall(self, text: str) -> tuple[int, ...] | None:
        """The tokens that were sampled for exactly this text, None when it is not known."""
        content = _encoded(text)
        key = self._key(content)
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return None
            self._records.move_to_end(key)
        reply = decode_sampled(key, record)
        if (reply.text_bytes, reply.text_sum) != (len(content), _text_sum(content)):
            return None
        return reply.tokens

    def remember(self, entries: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Remember the tokens of some texts, written later; the latest of equal texts counts."""
        changes: dict[bytes, bytes | None] = {}
        with self._lock:
            for text, tokens in entries:
                key, record = self._encode(_encoded(text), tokens)
                self._put(key, record)
                changes[key] = record
            self._evict(changes)
        if changes:
            self._write(changes)

    def forget_within(self, timelines: Sequence[bytes]) -> None:
        """Forget the replies whose tokens stand in one of these (little-endian u32)."""
        with self._lock:
            records = list(self._records.items())
        doomed = [key for key, record in records if _stands_in(sampled_bytes(record), timelines)]
        with self._lock:
            for key in doomed:
                self._num_bytes -= len(self._records.pop(key, b""))
        if doomed:
            self._write(dict.fromkeys(doomed))

    def _put(self, key: bytes, record: bytes) -> None:
        self._num_bytes += len(record) - len(self._records.pop(key, b""))
        self._records[key] = record

    def _evict(self, changes: dict[bytes, bytes | None]) -> None:
        while self._num_bytes > self._max_bytes:
            key, record = self._records.popitem(last=False)
            self._num_bytes -= len(record)
            changes[key] = None

    def _encode(self, content: bytes, tokens: tuple[int, ...]) -> tuple[bytes, bytes]:
        key = self._key(content)
        reply = SampledReply(
            hash=key,
            fingerprint=self._fingerprint,
            text_bytes=len(content),
            text_sum=_text_sum(content),
            created_us=time.time_ns() // 1000,
            tokens=tokens,
        )
        return key, encode_sampled(reply)

    def _key(self, content: bytes) -> bytes:
        return xxhash.xxh3_128_digest(self._fingerprint + content)


def _stands_in(tokens: bytes, timelines: Sequence[bytes]) -> bool:
    """Whether whole tokens stand in a timeline, not just their bytes."""
    for timeline in timelines:
        at = timeline.find(tokens)
        while at >= 0 and at % TOKEN_BYTES:
            at = timeline.find(tokens, at + 1)
        if at >= 0:
            return True
    return False


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text_sum(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content, seed=_TEXT_SUM_SEED)
