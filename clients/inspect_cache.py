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

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.cache.checkpoint_reader import read_page, read_state
from daemon.cache.index_loader import load_index
from daemon.cache.prefix_index import PrefixIndex
from daemon.cache.records import FORMAT_VERSION, DamagedRecord, StateHeader
from daemon.cache.session_catalogue import read_records
from daemon.cache.sessions import (
    Ancestors,
    CheckpointRow,
    SessionRow,
    session_groups,
    session_row,
    stored_states,
)
from daemon.cache.store import Store
from daemon.config import default_cache_folder
from daemon.errors import QwendError

_MIN_WIDTH = 100


class ModelRow(Struct, frozen=True, kw_only=True):
    """A model whose checkpoints are in the store."""

    fingerprint: str
    name: str
    num_checkpoints: int


class DamagedRow(Struct, frozen=True, kw_only=True):
    """A record that is not what was written; the daemon will drop it when it meets it."""

    kind: str
    key: str
    problem: str


class StoreView(Struct, frozen=True, kw_only=True):
    """All that is shown, and with --json the document itself. Bytes are on disk.

    `num_stale` records cannot be reached and go when the daemon opens the store next. `damaged` is
    None when payloads were not read.
    """

    path: str
    format_version: int
    file_bytes: int
    num_bytes: int
    num_checkpoints: int
    num_pages: int
    num_stale: int
    models: tuple[ModelRow, ...]
    sessions: tuple[SessionRow, ...]
    damaged: tuple[DamagedRow, ...] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Show a store; 0, or 1 when there is an error or damage."""
    arguments = _parser().parse_args(argv)
    try:
        view = read_store(arguments.cache_dir, verify=arguments.verify)
    except QwendError as error:
        print(f"qwend: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(view)).decode())
    elif view is None:
        print(f"No checkpoints in {arguments.cache_dir}.")
    else:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _MIN_WIDTH)
        show(view, console, now_us=time.time_ns() // 1000)
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
        damaged = tuple(_damaged_rows(store)) if verify else None
        return _view(store, damaged)
    finally:
        store.close()


def show(view: StoreView, console: Console, *, now_us: int) -> None:
    """Print tables: totals, sessions with their checkpoints, damage."""
    console.print(_totals(view))
    if view.sessions:
        console.print(_session_table(view, now_us))
    if view.num_stale:
        console.print(f"{view.num_stale} unreachable records go when the daemon starts next.")
    if view.damaged is not None:
        console.print(_damage_table(view.damaged) if view.damaged else "All records are sound.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwend inspect", description="Show what the checkpoint store holds."
    )
    folder = default_cache_folder()
    parser.add_argument(
        "--cache-dir", type=Path, default=folder, help=f"the store's folder (default: {folder})"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every record and compare its checksum"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _view(store: Store, damaged: tuple[DamagedRow, ...] | None) -> StoreView:
    with store.reading() as reader:
        loaded = load_index(reader)
        names = reader.models()
        records = read_records(reader.headers("sessions"))
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
        models=tuple(
            ModelRow(fingerprint=model.hex(), name=names.get(model, ""), num_checkpoints=count)
            for model, count in per_model.most_common()
        ),
        sessions=tuple(
            session_row(group, _ancestors(loaded.index))
            for group in session_groups(states, records)
        ),
        damaged=damaged,
    )


def _ancestors(index: PrefixIndex) -> Ancestors:
    def find(key: bytes) -> list[StateHeader]:
        state = index.state(key)
        return [] if state is None else list(index.ancestors(state))

    return find


def _damaged_rows(store: Store) -> Iterator[DamagedRow]:
    """Check record by record, each in its own view, so that a running daemon can reuse space."""
    for kind, read in (("page", read_page), ("state", read_state)):
        table = f"{kind}s"
        with store.reading() as reader:
            keys = [key for key, _ in reader.headers(table)]
        for key in keys:
            with store.reading() as reader:
                if reader.header(table, key) is None:
                    continue  # deleted meanwhile
                try:
                    read(reader, key)
                except DamagedRecord as error:
                    yield DamagedRow(kind=kind, key=key.hex(), problem=str(error))


def _totals(view: StoreView) -> Text:
    models = ", ".join(
        f"{model.name or 'a nameless model'} ({model.fingerprint[:12]}): {model.num_checkpoints}"
        for model in view.models
    )
    lines = [
        f"{view.path} · format {view.format_version}",
        f"{view.num_checkpoints} checkpoints and {view.num_pages} KV pages,"
        f" {_size(view.num_bytes)} in a file of {_size(view.file_bytes)}",
    ]
    return Text("\n".join(lines + ([models] if models else [])))


def _session_table(view: StoreView, now_us: int) -> Table:
    names = {model.fingerprint: model.name or model.fingerprint[:12] for model in view.models}
    table = Table(title="Sessions, the last used first", title_justify="left")
    for heading in ("session", "model", "checkpoint"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "size", "used"):
        table.add_column(heading, justify="right", no_wrap=True)
    for session in view.sessions:
        table.add_row(
            Text(_printable(session.session) or "-", style="bold"),
            Text(_printable(names[session.model])),
            f"{len(session.checkpoints)} in all",
            f"{session.num_tokens:,}",
            _size(session.num_bytes),
            _age(session.used_us, now_us),
        )
        for checkpoint in session.checkpoints:
            table.add_row("", "", *_checkpoint_cells(checkpoint, now_us), style="dim")
    return table


def _checkpoint_cells(checkpoint: CheckpointRow, now_us: int) -> tuple[str, ...]:
    born = "on the grid" if checkpoint.born == "prompt" else "decoded"
    return (
        f"{checkpoint.reason}, {born}",
        f"{checkpoint.position:,}",
        _size(checkpoint.num_bytes),
        _age(checkpoint.used_us, now_us),
    )


def _damage_table(rows: Sequence[DamagedRow]) -> Table:
    table = Table("record", "key", "problem", title="Damaged", title_justify="left")
    for row in rows:
        table.add_row(row.kind, row.key, row.problem)
    return table


def _printable(text: str) -> str:
    """A client chose it: no control characters to the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _age(then_us: int, now_us: int) -> str:
    seconds = max(now_us - then_us, 0) // 1_000_000
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
