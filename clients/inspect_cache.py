"""`qwend inspect`: what the checkpoint store holds, while the daemon runs and when it is down.

Owns the look of it. Opens the store for reading only, so it can disturb nothing; this is the one
client that reads files instead of speaking HTTP. One thread.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.cache.checkpoint_reader import read_page, read_state
from daemon.cache.contents import StoreContents, read_contents
from daemon.cache.damage import Damage
from daemon.cache.prefix_index import PrefixIndex
from daemon.cache.records import FORMAT_VERSION, DamagedRecord, StateHeader
from daemon.cache.sessions import (
    Ancestors,
    SessionRow,
    session_groups,
    session_row,
    stored_states,
)
from daemon.cache.store import Reader, Store
from daemon.cache.write_ledger import WriteStats, write_stats
from daemon.config import default_cache_folder
from daemon.errors import QwendError, UnknownSession

from . import request_commands, session_commands
from .client import DEFAULT_URL, ClientError
from .terminal import age, console, printable, size


class ModelRow(Struct, frozen=True, kw_only=True):
    """A model whose checkpoints are in the store."""

    fingerprint: str
    name: str
    num_checkpoints: int


class DamagedRow(Struct, frozen=True, kw_only=True):
    """A record that is not what was written; the daemon will drop it when it meets it."""

    table: str
    key: str
    problem: str


class StoreView(Struct, frozen=True, kw_only=True):
    """All that is shown, and with --json the document itself. Bytes are on disk.

    `num_stale` records cannot be reached and go when the daemon opens the store next. `damaged` are
    among payloads too only if these were read, `with_payloads`.
    """

    path: str
    format_version: int
    file_bytes: int
    num_bytes: int
    num_checkpoints: int
    num_pages: int
    num_stale: int
    writes: WriteStats
    models: tuple[ModelRow, ...]
    sessions: tuple[SessionRow, ...]
    damaged: tuple[DamagedRow, ...]
    with_payloads: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or show the store; 0, or 1 when there is an error or damage."""
    arguments = _parser().parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except (QwendError, ClientError) as error:
        print(f"qwend: {error}", file=sys.stderr)
        return 1
    return status or 0


def _show_store(arguments: argparse.Namespace) -> int:
    view = read_store(arguments.cache_dir, verify=arguments.verify)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(view)).decode())
    elif view is None:
        print(f"No checkpoints in {arguments.cache_dir}.")
    else:
        show(view, console(), now_us=time.time_ns() // 1000)
    return 1 if view is not None and view.damaged else 0


def read_store(path: Path, *, verify: bool) -> StoreView | None:
    """Read a store; None when there is none.

    Args:
        verify: read every payload and compare its checksum.

    Raises:
        ConfigError, StoreVersionError, StoreError: see `Store.open_for_reading`.
    """
    store = Store.open_for_reading(path)
    if store is None:
        return None
    try:
        return _view(store, verify)
    finally:
        store.close()


def show(view: StoreView, output: Console, *, now_us: int) -> None:
    """Print tables: totals, sessions with their checkpoints, damage."""
    output.print(_totals(view))
    if view.sessions:
        output.print(_session_table(view, now_us))
    if view.num_stale:
        output.print(f"{view.num_stale} unreachable records go when the daemon starts next.")
    if view.damaged:
        output.print(_damage_table(view.damaged))
    elif view.with_payloads:
        output.print("All records are sound.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwend inspect",
        description="Show what the checkpoint store holds, and change its sessions.",
        parents=[_shared(is_default=True)],
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every record and compare its checksum"
    )
    parser.set_defaults(run=_show_store)
    commands = parser.add_subparsers(metavar="COMMAND")
    shared = _shared(is_default=False)
    text = "show one session with its checkpoints"
    look = commands.add_parser("show", help=text, description=text, parents=[shared])
    look.add_argument("session", help="its id or name")
    look.set_defaults(run=_show_session)
    session_commands.register(commands, shared)
    request_commands.register(commands, shared)
    return parser


def _shared(is_default: bool) -> argparse.ArgumentParser:
    """Flags that stand before or after a command; only those before it have defaults."""
    folder = default_cache_folder()
    flags = argparse.ArgumentParser(add_help=False)

    def add(name: str, default: object, text: str, **kind: Any) -> None:
        given = default if is_default else argparse.SUPPRESS
        flags.add_argument(name, default=given, help=text, **kind)

    add("--cache-dir", folder, f"the store's folder (default: {folder})", type=Path)
    add("--cache-size", "20G", "its budget, half of which may be pinned (default: 20G)")
    add("--url", DEFAULT_URL, f"the daemon that has it open (default: {DEFAULT_URL})")
    add("--api-key", "", "one of that daemon's, if it has keys")
    add("--json", False, "print JSON instead of tables", action="store_true")
    return flags


def _view(store: Store, verify: bool) -> StoreView:
    with store.reading() as reader:
        contents = read_contents(reader)
    loaded = contents.loaded
    damaged = [*contents.damaged, *(_damaged_payloads(store, contents) if verify else ())]
    states = stored_states(loaded.index, lambda _: False)
    per_model = Counter(state.header.fingerprint for state in states)
    return StoreView(
        path=str(store.path),
        format_version=FORMAT_VERSION,
        file_bytes=store.file_bytes(),
        num_bytes=loaded.index.num_bytes,
        num_checkpoints=len(states),
        num_pages=loaded.index.num_pages,
        num_stale=len(loaded.stale_pages) + len(loaded.stale_states),
        writes=write_stats(contents.writes, time.time_ns() // 1000, None),
        models=tuple(
            ModelRow(
                fingerprint=model.hex(), name=contents.models.get(model, ""), num_checkpoints=count
            )
            for model, count in per_model.most_common()
        ),
        sessions=tuple(
            session_row(group, _ancestors(loaded.index))
            for group in session_groups(states, contents.sessions)
        ),
        damaged=tuple(
            DamagedRow(table=each.table, key=each.key.hex(), problem=each.problem)
            for each in damaged
        ),
        with_payloads=verify,
    )


def _ancestors(index: PrefixIndex) -> Ancestors:
    def find(key: bytes) -> list[StateHeader]:
        state = index.state(key)
        return [] if state is None else list(index.ancestors(state))

    return find


def _damaged_payloads(store: Store, contents: StoreContents) -> Iterator[Damage]:
    """Check payload by payload, each in its own view, so that a running daemon can reuse space."""
    known = {(damage.table, damage.key) for damage in contents.damaged}
    for table, read in (("pages", read_page), ("states", read_state)):
        with store.reading() as reader:
            keys = [key for key, _ in reader.records(table) if (table, key) not in known]
        for key in keys:
            with store.reading() as reader:
                if reader.header(table, key) is None:
                    continue  # deleted meanwhile
                try:
                    read(reader, key)
                except DamagedRecord as error:
                    yield Damage(Reader.payload_table(table), key, str(error))


def _totals(view: StoreView) -> Text:
    models = ", ".join(
        f"{model.name or 'a nameless model'} ({model.fingerprint[:12]}): {model.num_checkpoints}"
        for model in view.models
    )
    lines = [
        f"{view.path} · format {view.format_version}",
        f"{view.num_checkpoints} checkpoints and {view.num_pages} KV pages,"
        f" {size(view.num_bytes)} in a file of {size(view.file_bytes)}",
    ]
    written = sum(view.writes.by_day.values())
    if written:
        lines.append(
            f"written today {size(view.writes.today_bytes)}, in {len(view.writes.by_day)} days"
            f" {size(written)}; {view.writes.sharing:.1f} times as much without shared pages"
        )
    return Text("\n".join(lines + ([models] if models else [])))


def _session_table(view: StoreView, now_us: int) -> Table:
    names = {model.fingerprint: model.name or model.fingerprint[:12] for model in view.models}
    table = Table(title="Sessions, the last used first", title_justify="left")
    table.add_column("id", no_wrap=True)
    table.add_column("session", overflow="fold")
    if len(names) > 1:
        table.add_column("model", overflow="fold")
    for heading in ("tokens", "checkpoints", "size", "used"):
        table.add_column(heading, justify="right", no_wrap=True)
    for session in view.sessions:
        table.add_row(
            session.id,
            _naming(session),
            *([Text(printable(names[session.model]))] if len(names) > 1 else []),
            f"{session.num_tokens:,}",
            str(len(session.checkpoints)),
            size(session.num_bytes),
            age(session.used_us, now_us),
        )
    return table


def _naming(session: SessionRow) -> Text:
    """Title or name, and beneath it what is special about it."""
    text = Text(printable(session.title or session.session) or "-", style="bold")
    notes = [printable(session.session)] if session.title and session.session else []
    notes += ["pinned"] if session.is_pinned else []
    notes += [f"from {session.parents[0]}"] if session.parents else []
    return text.append("\n" + " · ".join(notes), style="not bold dim") if notes else text


def _show_session(arguments: argparse.Namespace) -> int:
    view = read_store(arguments.cache_dir, verify=False)
    wanted = arguments.session
    rows = [row for row in (view.sessions if view else ()) if wanted in (row.id, row.session)]
    if not rows:
        raise UnknownSession(f"There is no session {wanted!r} in {arguments.cache_dir}.")
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return 0
    output = console()
    for row in rows:
        output.print(_naming(row))
        output.print(_checkpoint_table(row, time.time_ns() // 1000))
    return 0


def _checkpoint_table(session: SessionRow, now_us: int) -> Table:
    origin = f", goes on from {', '.join(session.parents)}" if session.parents else ""
    table = Table(
        title=f"{session.id}: {session.num_tokens:,} tokens, {size(session.num_bytes)}{origin}",
        title_justify="left",
    )
    for heading in ("position", "reason", "born", "state", "taken", "used"):
        table.add_column(heading, justify="left" if heading in ("reason", "born") else "right")
    for checkpoint in session.checkpoints:
        table.add_row(
            f"{checkpoint.position:,}",
            checkpoint.reason,
            "on the grid" if checkpoint.born == "prompt" else "decoded",
            size(checkpoint.num_bytes),
            age(checkpoint.created_us, now_us),
            age(checkpoint.used_us, now_us),
        )
    return table


def _damage_table(rows: Sequence[DamagedRow]) -> Table:
    table = Table("table", "key", "problem", title="Damaged", title_justify="left")
    for row in rows:
        table.add_row(row.table, row.key, row.problem)
    return table
