"""Which records of a store are not what was written.

Owns the sifting of a table, and what the log says of it. What becomes of the damaged decides who
opens the store. No LMDB, no thread.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from msgspec import Struct

from daemon.cache.records import DamagedRecord

T = TypeVar("T")

Decode = Callable[[bytes, bytes], T]
"""What a key and a record say; raises DamagedRecord."""


class Damage(Struct, frozen=True):
    """A record that failed a check: where it lies, and what is wrong with it."""

    table: str
    key: bytes
    problem: str


def sift(
    table: str, records: Iterable[tuple[bytes, bytes]], decode: Decode[T], damaged: list[Damage]
) -> dict[bytes, T]:
    """What the sound records of a table say, by key; `damaged` takes the others."""
    sound = {}
    for key, record in records:
        try:
            sound[key] = decode(key, record)
        except DamagedRecord as error:
            damaged.append(Damage(table, key, str(error)))
    return sound


def summary(damaged: Sequence[Damage]) -> str:
    """How many of which tables, on one line, with the first problem of each."""
    problems = {damage.table: damage.problem for damage in reversed(damaged)}
    counts = Counter(damage.table for damage in damaged)
    return "; ".join(f"{table}: {num}, {problems[table]}" for table, num in counts.items())
