"""What a store holds, read once when it is opened: all tables, but no payload.

Owns which table is read how. Whatever is damaged is left out and named; that it goes and is counted
is the opener's part. Runs on the opening thread.
"""

from msgspec import Struct

from daemon.cache.damage import Damage, sift
from daemon.cache.index_loader import LoadedIndex, load_index
from daemon.cache.learned_cuts import CUTS_KEY, decode_cuts
from daemon.cache.records import DamagedRecord, decode_model
from daemon.cache.sampled_text import AgedRecord, decode_aged
from daemon.cache.session_records import SessionRecord, decode_session
from daemon.cache.store import VERSION_KEY, Reader
from daemon.cache.write_ledger import LedgerKey, Writes, decode_writes


class StoreContents(Struct, frozen=True, kw_only=True):
    """The sound records of a store: sampled replies, sessions and models' names by their keys, the
    ledger by day and session. `damaged` are the others, of all tables."""

    loaded: LoadedIndex
    sampled: dict[bytes, AgedRecord]
    sessions: dict[bytes, SessionRecord]
    writes: dict[LedgerKey, Writes]
    cuts: tuple[int, ...]
    models: dict[bytes, str]
    damaged: tuple[Damage, ...]


def read_contents(reader: Reader) -> StoreContents:
    """Read one consistent view."""
    damaged: list[Damage] = []
    sampled = sift("sampled", reader.records("sampled"), decode_aged, damaged)
    sessions = sift("sessions", reader.records("sessions"), decode_session, damaged)
    writes = sift("writes", reader.records("writes"), decode_writes, damaged)
    models = sift("models", reader.records("models"), decode_model, damaged)
    learned = ((key, record) for key, record in reader.records("meta") if key != VERSION_KEY)
    cuts = sift("meta", learned, _decode_learned, damaged)
    return StoreContents(
        loaded=load_index(reader, damaged),
        sampled=sampled,
        sessions=sessions,
        writes=dict(writes.values()),
        cuts=cuts.get(CUTS_KEY, ()),
        models=models,
        damaged=tuple(damaged),
    )


def _decode_learned(key: bytes, record: bytes) -> tuple[int, ...]:
    if key != CUTS_KEY:
        raise DamagedRecord("an entry whose name means nothing")
    return decode_cuts(record)
