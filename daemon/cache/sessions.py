"""Checkpoints as people see them: sessions, each a chain of positions with reasons.

Owns the grouping. Reads only; pure functions over what the index knows, for any thread.
"""

from collections.abc import Callable, Iterable

from msgspec import Struct

from daemon.cache.prefix_index import PrefixIndex
from daemon.cache.records import StateHeader
from daemon.cache.store import footprint
from daemon.checkpoint import Birth, Reason


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
    longest; pages that sessions share are counted for each.
    """

    session: str
    model: str
    num_tokens: int
    num_bytes: int
    used_us: int
    checkpoints: tuple[CheckpointRow, ...]


def stored_states(index: PrefixIndex, is_queued: Callable[[bytes], bool]) -> list[StoredState]:
    """All states of an index; `is_queued` says by key which of them are not on disk yet."""
    return [_stored_state(index, state, is_queued(state.key)) for state in index.states]


def session_rows(states: Iterable[StoredState]) -> tuple[SessionRow, ...]:
    """Sessions, the last used first. Checkpoints saved without a hint form one of no name."""
    groups: dict[tuple[bytes, str], list[StoredState]] = {}
    for state in states:
        key = (state.header.fingerprint, state.header.session)
        groups.setdefault(key, []).append(state)
    rows = [_session_row(model, session, group) for (model, session), group in groups.items()]
    return tuple(sorted(rows, key=lambda row: row.used_us, reverse=True))


def _stored_state(index: PrefixIndex, state: StateHeader, is_queued: bool) -> StoredState:
    tip = index.page(state.tip)
    assert tip is not None
    num_bytes = footprint(state.payload_bytes)
    return StoredState(state, index.used_us(state.key), num_bytes, tip.num_chain_bytes, is_queued)


def _session_row(model: bytes, session: str, states: list[StoredState]) -> SessionRow:
    states = sorted(states, key=lambda state: (state.header.position, state.header.born))
    longest = states[-1]
    return SessionRow(
        session=session,
        model=model.hex(),
        num_tokens=longest.header.position,
        num_bytes=sum(state.num_bytes for state in states) + longest.num_page_bytes,
        used_us=max(state.used_us for state in states),
        checkpoints=tuple(_checkpoint_row(state) for state in states),
    )


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
