"""Small changes that ride along with the next transaction.

Owns what is to be deleted and put beside a checkpoint. Not thread-safe: `transfer` guards it.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from msgspec import Struct, field

from daemon.cache.damage import Damage
from daemon.cache.records import Use
from daemon.cache.store import WriteBatch
from daemon.cache.write_queue import Job

T = TypeVar("T")


class PendingChanges(Struct):
    """Keys to delete; last uses, sampled replies, sessions, the ledger's sums, what was learned and
    names of models by key (None: delete)."""

    doomed_pages: set[bytes] = field(default_factory=set)
    doomed_states: set[bytes] = field(default_factory=set)
    touched: dict[bytes, Use | None] = field(default_factory=dict)
    sampled: dict[bytes, bytes | None] = field(default_factory=dict)
    sessions: dict[bytes, bytes | None] = field(default_factory=dict)
    writes: dict[bytes, bytes | None] = field(default_factory=dict)
    meta: dict[bytes, bytes | None] = field(default_factory=dict)
    models: dict[bytes, str | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__struct_fields__)

    def drop(self, damaged: Iterable[Damage]) -> None:
        """Delete damaged records of all tables but those of checkpoints, which an index names."""
        tables: dict[str, dict[bytes, Any]] = {
            "uses": self.touched,
            "sampled": self.sampled,
            "sessions": self.sessions,
            "writes": self.writes,
            "meta": self.meta,
            "models": self.models,
        }
        for damage in damaged:
            if damage.table in tables:
                tables[damage.table][damage.key] = None

    def retry(self, failed: "PendingChanges") -> None:
        """Keep what must not be lost of changes that were not written."""
        self.doomed_pages |= failed.doomed_pages
        self.doomed_states |= failed.doomed_states
        self.touched = _deletions(failed.touched) | self.touched
        self.sampled = _deletions(failed.sampled) | self.sampled
        self.sessions = failed.sessions | self.sessions
        self.writes = failed.writes | self.writes
        self.meta = failed.meta | self.meta
        self.models = failed.models | self.models

    def batch(self, job: Job | None) -> WriteBatch:
        """One transaction: these changes, and a checkpoint."""
        return WriteBatch(
            delete_pages=list(self.doomed_pages),
            delete_states=list(self.doomed_states),
            put_pages=job.page_records() if job else (),
            put_state=job.state_record() if job else None,
            uses=self.touched,
            put_sampled=self.sampled,
            put_sessions=self.sessions,
            put_writes=self.writes,
            put_meta=self.meta,
            models=self.models,
        )


def _deletions(changes: dict[bytes, T | None]) -> dict[bytes, T | None]:
    return {key: None for key, change in changes.items() if change is None}
