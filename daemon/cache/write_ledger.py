"""What has been written to disk, by day and session, and how much of today's allowance is left.

Owns the sums, kept for so many days, and their records: key = day u32 big-endian · session utf-8,
value = magic "qwWL" · version u16 · checksum of the key u16 · written u64 · whole u64
· checkpoints u64 · checksum u64, little-endian.
Not thread-safe: `transfer` guards it.
"""

import struct
from collections.abc import Mapping
from datetime import UTC, date, datetime

from msgspec import Struct

from daemon.cache.records import RECORD_VERSION, DamagedRecord, checksum, sealed, unsealed

KEPT_DAYS = 31
_DAY_US = 86_400 * 1_000_000
_LAST_DAY = (date.max - date(1970, 1, 1)).days
_MAGIC = b"qwWL"
_SUMS = struct.Struct("<4sHHQQQ")

LedgerKey = tuple[int, str]
"""Day since 1970, session hint."""


class Writes(Struct, frozen=True):
    """Sums over some checkpoints: bytes written; what each would have been with all its pages, had
    none been stored before; and how many."""

    written_bytes: int = 0
    whole_bytes: int = 0
    num_checkpoints: int = 0

    @property
    def sharing(self) -> float:
        """How much less is written because pages are shared: whole / written."""
        return self.whole_bytes / self.written_bytes if self.written_bytes else 1.0

    def __add__(self, other: "Writes") -> "Writes":
        return Writes(
            self.written_bytes + other.written_bytes,
            self.whole_bytes + other.whole_bytes,
            self.num_checkpoints + other.num_checkpoints,
        )


class WriteStats(Struct, frozen=True, kw_only=True):
    """The ledger for people: bytes of this day (UTC) and of its sessions, of the days before by
    their dates, the day's allowance, and whole / written over all of it."""

    today_bytes: int
    daily_budget_bytes: int | None
    sharing: float
    by_day: dict[str, int]
    today_by_session: dict[str, int]


class WriteLedger:
    """The sums of a store.

    Args:
        sums: what the store holds.
        daily_bytes: that may be written in a day; None: as many as come.
    """

    def __init__(self, sums: Mapping[LedgerKey, Writes], daily_bytes: int | None) -> None:
        self._daily_bytes = daily_bytes
        self._sums = dict(sums)

    @property
    def sums(self) -> Mapping[LedgerKey, Writes]:
        """By day and session."""
        return self._sums

    def add(self, now_us: int, session: str, writes: Writes) -> dict[bytes, bytes | None]:
        """Count a checkpoint; returns the records to write, None to delete."""
        today = day_of(now_us)
        key = (today, session)
        self._sums[key] = self._sums.get(key, Writes()) + writes
        old = [key for key in self._sums if key[0] <= today - KEPT_DAYS]
        for gone in old:
            del self._sums[gone]
        changes: dict[bytes, bytes | None] = dict.fromkeys(map(_encode_key, old))
        record_key = _encode_key(key)
        changes[record_key] = _encode(record_key, self._sums[key])
        return changes

    def written_on(self, now_us: int) -> Writes:
        """The sums of a day."""
        today = day_of(now_us)
        return sum((sums for key, sums in self._sums.items() if key[0] == today), Writes())

    def pressure(self, now_us: int) -> float:
        """The share of today's allowance that is spent; 0 without one."""
        if self._daily_bytes is None:
            return 0.0
        return self.written_on(now_us).written_bytes / self._daily_bytes


def day_of(now_us: int) -> int:
    """The day since 1970, UTC."""
    return now_us // _DAY_US


def decode_writes(key: bytes, record: bytes) -> tuple[LedgerKey, Writes]:
    """Read a record.

    Raises:
        DamagedRecord: it is not whole, or belongs to another key.
    """
    content = unsealed(record, _MAGIC, _SUMS.size)
    _, _, key_sum, *counts = _SUMS.unpack_from(content)
    if key_sum != _key_sum(key) or len(content) != _SUMS.size:
        raise DamagedRecord("sums under another key or of another length")
    return _decode_key(key), Writes(*counts)


def write_stats(
    sums: Mapping[LedgerKey, Writes], now_us: int, daily_bytes: int | None
) -> WriteStats:
    """The sums as people see them."""
    today = day_of(now_us)
    by_day: dict[str, int] = {}
    for (day, _), writes in sorted(sums.items()):
        name = datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()
        by_day[name] = by_day.get(name, 0) + writes.written_bytes
    ours = {session: w.written_bytes for (day, session), w in sums.items() if day == today}
    return WriteStats(
        today_bytes=sum(ours.values()),
        daily_budget_bytes=daily_bytes,
        sharing=sum(sums.values(), Writes()).sharing,
        by_day=by_day,
        today_by_session=dict(sorted(ours.items(), key=lambda item: -item[1])),
    )


def _encode_key(key: LedgerKey) -> bytes:
    return key[0].to_bytes(4, "big") + key[1].encode()


def _decode_key(key: bytes) -> LedgerKey:
    day = int.from_bytes(key[:4], "big")
    if day > _LAST_DAY:
        raise DamagedRecord("a day that no calendar has")
    return day, key[4:].decode(errors="replace")


def _key_sum(key: bytes) -> int:
    """Of the key, which the record's own checksum leaves out."""
    return checksum(key) % 0xFFFF + 1


def _encode(key: bytes, sums: Writes) -> bytes:
    counts = (sums.written_bytes, sums.whole_bytes, sums.num_checkpoints)
    return sealed(_SUMS.pack(_MAGIC, RECORD_VERSION, _key_sum(key), *counts))
