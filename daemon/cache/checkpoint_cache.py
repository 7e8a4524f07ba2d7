"""The checkpoint store as the daemon sees it: timelines for the engine, numbers for people.

Owns the opening and closing of everything in cache/. Fulfils the engine's CheckpointStore without
importing it. `timeline` belongs to the engine thread; the rest to any.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from daemon.cache.records import MAX_SESSION_BYTES
from daemon.cache.sampled_text import SampledText
from daemon.cache.sessions import SessionRow, session_rows
from daemon.cache.store import MIN_MAP_BYTES, Store
from daemon.cache.timeline import StoredTimeline
from daemon.cache.transfer import Transfer, now_us
from daemon.checkpoint import PAGE_TOKENS
from daemon.errors import ConfigError

MIN_BUDGET_BYTES = 4 * MIN_MAP_BYTES


class CacheSettings(Struct, frozen=True, kw_only=True):
    """How the store is kept.

    Args:
        path: its folder.
        budget_bytes: what it may take of the disk; the data file never grows beyond it.
        queue_bytes: payloads that may wait in memory to be written.
        every_tokens: distance of interval checkpoints in a long prompt, a multiple of 64.
    """

    path: Path
    budget_bytes: int = 32 << 30
    queue_bytes: int = 2 << 30
    every_tokens: int = 2048

    @property
    def checkpoint_bytes(self) -> int:
        """The share of checkpoints. The rest is for sampled replies and for LMDB, which needs
        free room to replace what it deletes."""
        return self.budget_bytes * 13 // 16

    @property
    def sampled_bytes(self) -> int:
        """The share of sampled replies."""
        return min(self.budget_bytes // 32, 64 << 20)


class CacheStats(Struct, frozen=True, kw_only=True):
    """What is stored now, and what happened since the daemon started. Bytes on disk, but the
    queue's in memory."""

    num_checkpoints: int
    checkpoints_by_reason: dict[str, int]
    checkpoints_by_birth: dict[str, int]
    num_pages: int
    num_bytes: int
    budget_bytes: int
    queue_bytes: int
    num_sampled_replies: int
    num_written: int
    written_bytes: int
    num_dropped: int
    num_damaged: int
    num_evicted: int


class CheckpointCache:
    """Timelines over one store for one model.

    Args:
        store: opened for writing; `close` closes it.
        fingerprint: 16 bytes that name the model; see `prefix_hash.fingerprint`.
        now_us: the clock, microseconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        settings: CacheSettings,
        fingerprint: bytes,
        now_us: Callable[[], int] = now_us,
    ) -> None:
        self._settings = settings
        self._fingerprint = fingerprint
        self._now_us = now_us
        with store.reading() as reader:
            sampled = list(reader.headers("sampled"))
        self._transfer = Transfer(
            store,
            max_bytes=settings.checkpoint_bytes,
            queue_bytes=settings.queue_bytes,
            now_us=now_us,
        )
        self.sampled_text = SampledText(
            sampled,
            fingerprint=fingerprint,
            max_bytes=settings.sampled_bytes,
            write=self._transfer.write_sampled,
        )

    @classmethod
    def open(cls, settings: CacheSettings, fingerprint: bytes) -> "CheckpointCache":
        """Open or make the store of `settings`.

        Raises:
            ConfigError: a setting or the folder cannot be used.
            StoreInUse: another process writes there.
            StoreVersionError: another format version wrote it.
            StoreError: the files are not a sound store.
        """
        if settings.budget_bytes < MIN_BUDGET_BYTES:
            raise ConfigError(
                f"A checkpoint budget of {settings.budget_bytes:,} bytes is too small; "
                f"give at least {MIN_BUDGET_BYTES:,}."
            )
        if settings.every_tokens <= 0 or settings.every_tokens % PAGE_TOKENS:
            raise ConfigError(
                f"The distance of checkpoints must be a multiple of {PAGE_TOKENS} tokens, "
                f"not {settings.every_tokens}."
            )
        store = Store.open_for_writing(settings.path, settings.budget_bytes)
        try:
            return cls(store, settings, fingerprint)
        except BaseException:
            store.close()
            raise

    def timeline(self, tokens: Sequence[int], session: str) -> StoredTimeline:
        """Begin with a prompt; `session` groups checkpoints for people, not for look-up."""
        # Half a character at the cut, and lone surrogates, go.
        hint = session.encode(errors="ignore")[:MAX_SESSION_BYTES].decode(errors="ignore")
        return StoredTimeline(
            self._transfer,
            self._fingerprint,
            tokens,
            session=hint,
            every_tokens=self._settings.every_tokens,
            now_us=self._now_us,
        )

    def stats(self) -> CacheStats:
        """Numbers of this moment, over all models of the store."""
        states = self._transfer.states()
        counts = self._transfer.counts()
        return CacheStats(
            num_checkpoints=len(states),
            checkpoints_by_reason=dict(Counter(state.header.reason for state in states)),
            checkpoints_by_birth=dict(Counter(state.header.born for state in states)),
            num_pages=counts.num_pages,
            num_bytes=counts.num_bytes,
            budget_bytes=self._settings.budget_bytes,
            queue_bytes=counts.queue_bytes,
            num_sampled_replies=len(self.sampled_text),
            num_written=counts.num_written,
            written_bytes=counts.written_bytes,
            num_dropped=counts.num_dropped,
            num_damaged=counts.num_damaged,
            num_evicted=counts.num_evicted,
        )

    def sessions(self) -> tuple[SessionRow, ...]:
        """Sessions, the last used first."""
        return session_rows(self._transfer.states())

    def flush(self) -> None:
        """Wait until all that was saved before is on disk or given up."""
        self._transfer.flush()

    def close(self) -> None:
        """Write what waits and close the store; call it after the engine has stopped."""
        self._transfer.close()
