"""The checkpoint store as the daemon sees it: timelines for the engine, numbers for people.

Owns the opening and closing of everything in cache/. Fulfils the engine's CheckpointStore without
importing it. `timeline` belongs to the engine thread; the rest to any.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from daemon.cache.contents import read_contents
from daemon.cache.copier import Allocate, plain_buffer
from daemon.cache.learned_cuts import LearnedCuts
from daemon.cache.policy import Sizes
from daemon.cache.prefix_hash import PrefixChain
from daemon.cache.sampled_text import SampledText
from daemon.cache.session_catalogue import SessionCatalogue
from daemon.cache.session_records import clipped
from daemon.cache.store import MIN_MAP_BYTES, Store, footprint
from daemon.cache.stored_prompts import StoredPrompt, read_prompts
from daemon.cache.timeline import StoredTimeline
from daemon.cache.transfer import Transfer, now_us
from daemon.cache.write_ledger import WriteStats, write_stats
from daemon.checkpoint import PAGE_TOKENS, Birth, Found, Reach
from daemon.errors import ConfigError

MIN_BUDGET_BYTES = 4 * MIN_MAP_BYTES
QUEUE_BYTES = 2 << 30
"""Payloads that may wait in memory for the disk, unless the caller says otherwise."""


class CacheLimits(Struct, frozen=True, kw_only=True):
    """How much may be kept.

    Args:
        budget_bytes: of disk; the data file never grows beyond it.
        queue_bytes: of payloads that wait in memory to be written.
        memory_bytes: of payloads that stay in memory beside the disk.
        write_delay_s: how long what is superseded soon, as a rule, waits to be written.
        daily_bytes: that may be written in a day; None: as many as come.
        interval_tokens: between checkpoints inside a long prompt, a multiple of 64; None: by what
            a state takes, see `policy.Sizes`.
    """

    budget_bytes: int
    queue_bytes: int = QUEUE_BYTES
    memory_bytes: int = 0
    interval_tokens: int | None = None
    write_delay_s: float = 0.0
    daily_bytes: int | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """The checkpoints' share. The rest is for sampled replies, and free room, which LMDB needs
        to replace what it deletes."""
        return self.budget_bytes * 13 // 16

    @property
    def sampled_bytes(self) -> int:
        """The sampled replies' share."""
        return min(self.budget_bytes // 32, 64 << 20)


class CacheStats(Struct, frozen=True, kw_only=True):
    """What is stored now, and what happened since the daemon started. Bytes on disk, but
    in memory those that wait for the disk (`queue_bytes`) or stay beside it (`memory_bytes`)."""

    num_checkpoints: int
    checkpoints_by_reason: dict[str, int]
    checkpoints_by_birth: dict[str, int]
    num_pages: int
    num_bytes: int
    budget_bytes: int
    queue_bytes: int
    memory_bytes: int
    num_sampled_replies: int
    num_written: int
    written_bytes: int
    num_dropped: int
    num_damaged: int
    num_evicted: int
    num_superseded: int
    writes: WriteStats


class CheckpointCache:
    """Timelines over one store for one model.

    Args:
        store: opened for writing; `close` closes it.
        fingerprint: 16 bytes that name the model; see `prefix_hash.fingerprint`.
        model_name: the same for people.
        now_us: the clock, microseconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        limits: CacheLimits,
        *,
        fingerprint: bytes,
        model_name: str,
        now_us: Callable[[], int] = now_us,
    ) -> None:
        self._limits = limits
        self._fingerprint = fingerprint
        self._now_us = now_us
        with store.reading() as reader:
            contents = read_contents(reader)
        self._transfer = Transfer(
            store,
            contents,
            max_bytes=limits.checkpoint_bytes,
            queue_bytes=limits.queue_bytes,
            memory_bytes=limits.memory_bytes,
            write_delay_us=int(limits.write_delay_s * 1e6),
            daily_bytes=limits.daily_bytes,
            now_us=now_us,
        )
        self.expect(1, 1)
        self._transfer.name_model(fingerprint, model_name)
        self.sampled = SampledText(
            contents.sampled,
            fingerprint=fingerprint,
            max_bytes=limits.sampled_bytes,
            write=self._transfer.write_sampled,
        )
        self.cuts = LearnedCuts(contents.cuts, write=self._transfer.write_meta)
        self.catalogue = SessionCatalogue(
            self._transfer,
            self.sampled,
            self.cuts,
            contents.sessions,
            max_bytes=limits.checkpoint_bytes,
            fingerprints=[fingerprint],
            names={**contents.models, fingerprint: model_name},
        )

    @classmethod
    def open(
        cls,
        path: Path,
        limits: CacheLimits,
        *,
        fingerprint: bytes,
        model_name: str,
    ) -> "CheckpointCache":
        """Open or make the store in folder `path`.

        Raises:
            ConfigError: a limit or the folder cannot be used.
            StoreInUse: another process writes there.
            StoreVersionError: another format version wrote it.
            StoreError: the files are not a sound store.
        """
        if limits.budget_bytes < MIN_BUDGET_BYTES:
            raise ConfigError(
                f"A checkpoint budget of {limits.budget_bytes:,} bytes is too small; "
                f"give at least {MIN_BUDGET_BYTES:,}."
            )
        interval = limits.interval_tokens
        if interval is not None and (interval <= 0 or interval % PAGE_TOKENS):
            raise ConfigError(
                f"The interval of checkpoints must be a multiple of {PAGE_TOKENS} tokens, "
                f"not {interval}."
            )
        store = Store.open_for_writing(path, limits.budget_bytes)
        try:
            return cls(store, limits, fingerprint=fingerprint, model_name=model_name)
        except BaseException:
            store.close()
            raise

    def expect(self, state_bytes: int, page_bytes: int, allocate: Allocate = plain_buffer) -> None:
        """Say what states and pages take in memory, on which depends how many are worth it, and
        where the buffers come from that they are read into."""
        self._sizes = Sizes(
            state_bytes=footprint(state_bytes),
            page_bytes=footprint(page_bytes),
            budget_bytes=self._limits.checkpoint_bytes,
            interval_tokens=self._limits.interval_tokens,
        )
        self._transfer.expect(self._sizes, allocate)

    def timeline(self, tokens: Sequence[int], session: str) -> StoredTimeline:
        """Begin with a prompt; `session` groups checkpoints for people, not for look-up."""
        return StoredTimeline(
            self._transfer,
            self._fingerprint,
            tokens,
            session=clipped(session),
            sizes=self._sizes,
            now_us=self._now_us,
        )

    @property
    def num_wipes(self) -> int:
        """How often checkpoints were wiped, or found wrong."""
        return self._transfer.num_wipes

    def reach(
        self,
        tokens: Sequence[int],
        limit: int,
        strict: bool,
        on_device: Callable[[bytes], Birth | None] = lambda _: None,
    ) -> Reach:
        """What there is of a prompt at a position <= limit, and what was, without reading it.

        Args:
            on_device: how the state was born, if one lies there, after tokens of a name; see
                `StoredTimeline.name`.
        """
        hashes = PrefixChain(self._fingerprint, tokens).hashes
        with self._transfer.looking() as shelf:
            reach = shelf.reach(hashes, limit, strict)
        num_stored = 0 if reach.found is None else reach.found.position // PAGE_TOKENS
        for num_pages in range(min(limit // PAGE_TOKENS, len(hashes)), num_stored, -1):
            born = on_device(hashes[num_pages - 1])
            if born == "prompt" or (born and not strict):
                found = Found(num_pages * PAGE_TOKENS, born, "junction", "device")
                return Reach(found, reach.departed)
        return reach

    def discard(self, tokens: Sequence[int]) -> None:
        """Drop a prompt's checkpoints, since an audit found one wrong, and all that shares a page
        with them: any of these may be what was wrong."""
        first = PrefixChain(self._fingerprint, tokens[:PAGE_TOKENS]).hashes[0]
        with self._transfer.looking() as shelf:
            doomed = shelf.beginning_with(first)
        self._transfer.wipe(doomed, "damaged")

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
            budget_bytes=self._limits.budget_bytes,
            queue_bytes=counts.queue_bytes,
            memory_bytes=counts.memory_bytes,
            num_sampled_replies=len(self.sampled),
            num_written=counts.num_written,
            written_bytes=counts.written_bytes,
            num_dropped=counts.num_dropped,
            num_damaged=counts.num_damaged,
            num_evicted=counts.num_evicted,
            num_superseded=counts.num_superseded,
            writes=write_stats(counts.writes, self._now_us(), self._limits.daily_bytes),
        )

    def stored_prompts(self, max_tokens: int) -> list[StoredPrompt]:
        """The tokens of what is on disk, the last used first: all models' prompts."""
        with self._transfer.looking() as shelf:
            branches = shelf.branches(max_tokens)
        with self._transfer.reading() as reader:
            return list(read_prompts(reader, branches))

    def suggest_title(self, session: str, title: str, is_final: bool = True) -> None:
        """Give a session of the served model a title unless it has one; memory only. One that is
        not final, as of a side request without tools, gives way to the next."""
        self.catalogue.suggest_title(self._fingerprint, session, title, is_final)

    def flush(self) -> None:
        """Wait until all that was saved before is on disk or given up."""
        self._transfer.flush()

    def close(self, grace_s: float | None = None) -> None:
        """Write what waits, for so long, and close the store; call it after the engine has stopped.
        See `Transfer.close`."""
        self._transfer.close(grace_s)
