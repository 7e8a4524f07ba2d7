"""Sessions as objects: listed, named, pinned, forked, exported, imported, wiped.

Owns what people say of sessions; the checkpoints are transfer's. Any thread may call it, but none
that must not wait: exports read payloads, imports and wipes wait for the disk.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from daemon.cache.learned_cuts import LearnedCuts
from daemon.cache.record_source import RecordSource
from daemon.cache.records import StateHeader
from daemon.cache.sampled_text import SampledText
from daemon.cache.session_file import SessionFile, SessionHead, session_bytes
from daemon.cache.session_records import (
    SessionRecord,
    clipped,
    encode_session,
    session_id,
    session_key,
)
from daemon.cache.sessions import SessionGroup, SessionRow, session_groups, session_row
from daemon.cache.shelf import Branch
from daemon.cache.transfer import Transfer
from daemon.cache.write_queue import QueuedPage, QueuedState
from daemon.errors import InvalidRequest, SessionFileError, UnknownSession

MAX_RECORDS = 4096
MAX_PINNED_SHARE = 0.5
"""Of the budget: what is left must hold the sessions of the day."""


class SessionCatalogue:
    """The sessions of a store, all models together.

    Args:
        sampled: the replies of all sessions, of which a wipe takes its own.
        cuts: what was learned from all sessions, which goes with the last of them.
        records: what the store holds, by key.
        max_bytes: of all checkpoints.
        fingerprints: models whose exported sessions are taken in.
        names: models' names by fingerprint, for people.
    """

    def __init__(
        self,
        transfer: Transfer,
        sampled: SampledText,
        cuts: LearnedCuts,
        records: Mapping[bytes, SessionRecord],
        *,
        max_bytes: int,
        fingerprints: Sequence[bytes],
        names: Mapping[bytes, str],
    ) -> None:
        self._transfer = transfer
        self._source = RecordSource(transfer)
        self._sampled = sampled
        self._cuts = cuts
        self._max_bytes = max_bytes
        self._fingerprints = fingerprints
        self._names = names
        self._lock = threading.Lock()
        self._records = dict(records)
        self._provisional: set[bytes] = set()
        self._protect()

    # ── looking ───────────────────────────────────────────────────────────────────────────────

    def rows(self) -> tuple[SessionRow, ...]:
        """Sessions, the last used first."""
        return tuple(session_row(group, self._ancestors) for group in self._groups())

    def row(self, name: str) -> SessionRow:
        """One session, by its id or its own name.

        Raises:
            UnknownSession: there is none.
            InvalidRequest: several models have a session of that name.
        """
        return session_row(self._group(name), self._ancestors)

    @property
    def folder(self) -> Path:
        """The store's folder: its disk has room for what is imported."""
        return self._transfer.folder

    # ── naming, pinning, forking ──────────────────────────────────────────────────────────────

    def suggest_title(self, fingerprint: bytes, session: str, title: str, is_final: bool) -> None:
        """Give a session a title unless it has one, or one that was not final; memory only."""
        key = session_key(fingerprint, clipped(session))
        with self._lock:
            known = self._records.get(key)
            is_open = known is None or not known.title or (is_final and key in self._provisional)
            if not is_open or not title:
                return
            self._provisional.discard(key)
            if not is_final:
                self._provisional.add(key)
        record = known or self._new(fingerprint, session)
        self._put(msgspec.structs.replace(record, title=clipped(title)))

    def change(
        self, name: str, *, title: str | None = None, is_pinned: bool | None = None
    ) -> SessionRow:
        """Rename, pin or unpin a session.

        Raises:
            UnknownSession, InvalidRequest: see `row`; or it is too large to be pinned.
        """
        group = self._group(name)
        record = group.record
        if is_pinned and not record.is_pinned:
            self._check_pin(group)
        changes: dict[str, object] = {}
        if title is not None:
            changes["title"] = clipped(title)
            with self._lock:
                self._provisional.discard(record.key)
        if is_pinned is not None:
            changes["is_pinned"] = is_pinned
        self._put(msgspec.structs.replace(record, **changes))
        return self.row(session_id(record.fingerprint, record.session))

    def fork(self, name: str, session: str, *, position: int | None, title: str) -> SessionRow:
        """Make a session of that name which goes on from another's checkpoint at or before
        `position` (None: its last); it stays when the other is wiped.

        Raises:
            UnknownSession: see `row`.
            InvalidRequest: see `row`; the name is taken or empty, or there is no checkpoint so
                early.
        """
        group = self._group(name)
        limit = group.states[-1].header.position if position is None else position
        fitting = [state.header for state in group.states if state.header.position <= limit]
        if not fitting:
            first = group.states[0].header.position
            raise InvalidRequest(
                f"Session {name!r} has no checkpoint at or before {limit:,} tokens; its first is "
                f"at {first:,}.",
                "position",
            )
        fingerprint = group.record.fingerprint
        session = clipped(session)
        if not session:
            raise InvalidRequest("A fork needs a name of its own.", "session")
        if any(
            (other.record.fingerprint, other.record.session) == (fingerprint, session)
            for other in self._groups()
        ):
            raise InvalidRequest(f"There is a session {session!r} already.", "session")
        record = self._new(fingerprint, session)
        self._put(
            msgspec.structs.replace(
                record,
                title=clipped(title or group.record.title),
                parent=group.record.session,
                state_key=fitting[-1].key,
            )
        )
        return self.row(session_id(fingerprint, session))

    # ── wiping ────────────────────────────────────────────────────────────────────────────────

    def wipe(self, name: str, timelines: Sequence[bytes] = ()) -> SessionRow:
        """Delete a session's checkpoints but those that another one has too, as a fork does, and
        the replies that were sampled in it, and with the last session what was learned from them
        all; what it was.

        Args:
            timelines: token ids of the session (little-endian u32) that may not be stored yet.

        Raises:
            UnknownSession, InvalidRequest: see `row`.
        """
        group = self._group(name)
        owner = group.record.fingerprint, group.record.session
        self._transfer.revoke(*owner)
        self._transfer.flush()
        group = self._group(name)
        row = session_row(group, self._ancestors)
        stored = [self._source.tokens(branch.chain) for branch in self._branches(group)]
        kept = self._shared_keys(group)
        keys = [state.header.key for state in group.states]
        self._transfer.wipe(key for key in keys if key not in kept)
        self._sampled.forget_within([*stored, *timelines])
        self._bury(group.record, is_hidden=bool(kept))
        if not self._groups():
            self._cuts.forget()
        self._transfer.flush()
        # What was handed to the engine before may have begun since.
        self._transfer.revoke(*owner)
        return row

    def _bury(self, record: SessionRecord, is_hidden: bool) -> None:
        """Forget what is said of a session; what stays for its forks is no longer its own."""
        if is_hidden:
            now_us = _now_us()
            empty = self._new(record.fingerprint, record.session)
            self._put(msgspec.structs.replace(empty, created_us=now_us, wiped_us=now_us))
        else:
            self._put(record, delete=True)

    def _shared_keys(self, group: SessionGroup) -> set[bytes]:
        """Keys of a session's states that belong to another session too."""
        return {state.header.key for state in group.states} & {
            state.header.key
            for other in self._groups()
            if other.record.key != group.record.key
            for state in other.states
        }

    # ── export and import ─────────────────────────────────────────────────────────────────────

    def export(self, name: str) -> Iterator[bytes]:
        """A session as a file, piece by piece: all that a request could go on from, written yet or
        not; see `session_file`.

        Raises:
            UnknownSession, InvalidRequest: see `row`.
            SessionFileError: a record is damaged; it is dropped.
        """
        group = self._group(name)
        record = group.record
        head = SessionHead(
            fingerprint=record.fingerprint,
            model=self._names.get(record.fingerprint, ""),
            session=record.session,
            title=record.title,
            created_us=_now_us(),
        )
        return self._pieces(head, group)

    def _pieces(self, head: SessionHead, group: SessionGroup) -> Iterator[bytes]:
        with self._transfer.holding(self._keys(group)):
            yield from session_bytes(
                head, self._branches(group), self._source, self._transfer.drop_damaged
            )

    def take_in(self, path: Path, session: str | None) -> SessionRow:
        """Import an exported session, under its own name or another; one of that name keeps its
        title, its pin and its parent.

        Raises:
            SessionFileError: it is damaged, of another version or of another model; nothing of it
                is stored.
        """
        with SessionFile(path) as file:
            head = file.head
            if head.fingerprint not in self._fingerprints:
                raise SessionFileError(_other_model(head, self._fingerprints, self._names))
            name = clipped(session or head.session)
            last: StateHeader | None = None
            for checkpoint in file.checkpoints(name):
                state, payload = checkpoint.state
                pages = [QueuedPage(page, content) for page, content in checkpoint.pages]
                self._transfer.save(QueuedState(state, payload), pages)
                self._transfer.wait_for_room()
                last = state
        if last is None or self._branch(last.key) is None:
            raise SessionFileError("The session does not fit the checkpoints' budget.")
        with self._lock:
            known = self._records.get(session_key(head.fingerprint, name))
        record = self._new(head.fingerprint, name) if known is None else known
        title = record.title or clipped(head.title)
        self._put(msgspec.structs.replace(record, title=title, state_key=last.key, wiped_us=0))
        self._transfer.flush()
        return self.row(session_id(head.fingerprint, name))

    # ── within ────────────────────────────────────────────────────────────────────────────────

    def _ancestors(self, key: bytes) -> list[StateHeader]:
        with self._transfer.looking() as shelf:
            return shelf.ancestors(key)

    def _branch(self, key: bytes) -> Branch | None:
        with self._transfer.looking() as shelf:
            return shelf.branch(key)

    def _groups(self) -> list[SessionGroup]:
        with self._lock:
            records = dict(self._records)
        return session_groups(self._transfer.states(), records)

    def _group(self, name: str) -> SessionGroup:
        groups = self._groups()
        for group in groups:
            record = group.record
            if session_id(record.fingerprint, record.session) == name:
                return group
        named = [group for group in groups if group.record.session == name]
        if not named:
            raise UnknownSession(f"There is no session {name!r}.")
        if len(named) > 1:
            raise InvalidRequest(f"Several models have a session {name!r}; give its id.", "session")
        return named[0]

    def _keys(self, group: SessionGroup) -> list[bytes]:
        """Of the states of a session and all on the way to them."""
        own = [state.header.key for state in group.states]
        before = [other.key for key in own for other in reversed(self._ancestors(key))]
        return list(dict.fromkeys([*before, *own]))

    def _branches(self, group: SessionGroup) -> list[Branch]:
        """The states of a session and all on the way to them, the first position first."""
        found = [self._branch(key) for key in self._keys(group)]
        return sorted(filter(None, found), key=lambda branch: branch.state.position)

    def _check_pin(self, group: SessionGroup) -> None:
        pinned = [g for g in self._groups() if g.record.is_pinned] + [group]
        rows = [session_row(each, self._ancestors) for each in pinned]
        num_bytes, limit = sum(row.num_bytes for row in rows), self._max_bytes * MAX_PINNED_SHARE
        if num_bytes > limit:
            raise InvalidRequest(
                f"Pinned sessions would take {num_bytes:,} bytes of the {int(limit):,} that may be "
                "pinned; unpin another, or raise --cache-size.",
                "pinned",
            )

    def _new(self, fingerprint: bytes, session: str) -> SessionRecord:
        return SessionRecord(
            fingerprint=fingerprint, session=clipped(session), created_us=_now_us()
        )

    def _put(self, record: SessionRecord, delete: bool = False) -> None:
        changes: dict[bytes, bytes | None] = {}
        with self._lock:
            self._records.pop(record.key, None)
            self._provisional.intersection_update({*self._records, record.key})
            if delete:
                changes[record.key] = None
            else:
                self._records[record.key] = record
                changes[record.key] = encode_session(record)
            while len(self._records) > MAX_RECORDS and (idle := self._oldest_idle()):
                del self._records[idle]
                changes[idle] = None
        self._transfer.write_sessions(changes)
        self._protect()

    def _oldest_idle(self) -> bytes | None:
        return next((k for k, r in self._records.items() if not r.is_pinned), None)

    def _protect(self) -> None:
        with self._lock:
            pinned = [record for record in self._records.values() if record.is_pinned]
        names = frozenset((record.fingerprint, record.session) for record in pinned)
        keys = frozenset(record.state_key for record in pinned if record.state_key)
        self._transfer.protect(_protection(names, keys))


def _protection(
    names: frozenset[tuple[bytes, str]], keys: frozenset[bytes]
) -> Callable[[StateHeader], bool]:
    if not names:
        return lambda _: False
    return lambda state: (state.fingerprint, state.session) in names or state.key in keys


def _now_us() -> int:
    return time.time_ns() // 1000


def _other_model(head: SessionHead, own: Sequence[bytes], names: Mapping[bytes, str]) -> str:
    models = ", ".join(f"{names.get(print_, '')} ({print_.hex()[:12]})" for print_ in own)
    return (
        f"The session is of model {head.model} ({head.fingerprint.hex()[:12]}), and here it is "
        f"{models or 'none'}: weights, template, KV format and arithmetic must be the same."
    )
