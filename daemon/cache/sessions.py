"""Checkpoints as people see them: sessions, each a chain of positions with reasons.

Owns the grouping. Reads only; pure functions over what the index knows, for any thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct

from daemon.cache.prefix_index import PrefixIndex
from daemon.cache.records import StateHeader
from daemon.cache.session_records import SessionRecord, session_id, session_key
from daemon.cache.store import footprint
from daemon.checkpoint import Birth, Reason

Ancestors = Callable[[bytes], Sequence[StateHeader]]
"""By a state's key, the states on the way to it, the nearest first."""


class StoredState(Struct, frozen=True):
    """A state and its place: bytes on disk of itself and of all pages that it needs."""

    header: StateHeader
    used_us: int
    num_bytes: int
    num_page_bytes: int
    is_queued: bool


class CheckpointRow(Struct, frozen=True, kw_only=True):
    """One checkpoint; bytes on disk of its state alone, times in microseconds since 1970."""

    position: int
    reason: Reason
    born: Birth
    num_bytes: int
    created_us: int
    used_us: int
    is_queued: bool


class SessionRow(Struct, frozen=True, kw_only=True):
    """Checkpoints that were saved under one session hint for one model, by position.

    `num_tokens` is the longest position. `num_bytes` are all states and the KV pages of the
    longest; pages that sessions share are counted for each. `parents` are ids of the sessions that
    it goes on from, the nearest first.
    """

    id: str
    session: str
    title: str
    model: str
    num_tokens: int
    num_bytes: int
    created_us: int
    used_us: int
    is_pinned: bool
    parents: tuple[str, ...]
    checkpoints: tuple[CheckpointRow, ...]


class SessionGroup(Struct, frozen=True):
    """The states of a session by position, and what is recorded of it."""

    record: SessionRecord
    states: tuple[StoredState, ...]


def stored_states(index: PrefixIndex, is_queued: Callable[[bytes], bool]) -> list[StoredState]:
    """All states of an index; `is_queued` says by key which of them are not on disk yet."""
    return [_stored_state(index, state, is_queued(state.key)) for state in index.states]


def session_groups(
    states: Iterable[StoredState], records: Mapping[bytes, SessionRecord]
) -> list[SessionGroup]:
    """Sessions, the last used first. Checkpoints saved without a hint form one of no name; a state
    that a record names belongs to that session too."""
    by_key = {state.header.key: state for state in states}
    groups: dict[bytes, dict[bytes, StoredState]] = {}
    known = dict(records)
    for state in by_key.values():
        header = state.header
        key = session_key(header.fingerprint, header.session)
        if key in records and header.created_us <= records[key].wiped_us:
            continue
        groups.setdefault(key, {})[header.key] = state
        if key not in known:
            known[key] = SessionRecord(fingerprint=header.fingerprint, session=header.session)
    for key, record in records.items():
        if record.state_key in by_key:
            groups.setdefault(key, {})[record.state_key] = by_key[record.state_key]
    found = [
        SessionGroup(known[key], tuple(sorted(group.values(), key=_place)))
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda group: max(s.used_us for s in group.states), reverse=True)


def session_row(group: SessionGroup, ancestors: Ancestors) -> SessionRow:
    """A session as people see it."""
    record, longest = group.record, group.states[-1]
    return SessionRow(
        id=session_id(record.fingerprint, record.session),
        session=record.session,
        title=record.title,
        model=record.fingerprint.hex(),
        num_tokens=longest.header.position,
        num_bytes=sum(state.num_bytes for state in group.states) + longest.num_page_bytes,
        created_us=min(state.header.created_us for state in group.states),
        used_us=max(state.used_us for state in group.states),
        is_pinned=record.is_pinned,
        parents=_parents(record, [longest.header, *ancestors(longest.header.key)]),
        checkpoints=tuple(map(_checkpoint_row, group.states)),
    )


def _place(state: StoredState) -> tuple[int, Birth]:
    return state.header.position, state.header.born


def _stored_state(index: PrefixIndex, state: StateHeader, is_queued: bool) -> StoredState:
    tip = index.page(state.tip)
    assert tip is not None
    num_bytes = footprint(state.payload_bytes)
    return StoredState(state, index.used_us(state.key), num_bytes, tip.num_chain_bytes, is_queued)


def _parents(record: SessionRecord, states: Iterable[StateHeader]) -> tuple[str, ...]:
    names = [record.parent] if record.parent else []
    names += [state.session for state in states]
    others = dict.fromkeys(name for name in names if name != record.session)
    return tuple(session_id(record.fingerprint, name) for name in others)


def _checkpoint_row(state: StoredState) -> CheckpointRow:
    return CheckpointRow(
        position=state.header.position,
        reason=state.header.reason,
        born=state.header.born,
        num_bytes=state.num_bytes,
        created_us=state.header.created_us,
        used_us=state.used_us,
        is_queued=state.is_queued,
    )
