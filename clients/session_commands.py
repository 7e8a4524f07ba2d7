"""`qwend inspect pin|unpin|rename|fork|wipe|export|import`: sessions as objects, from a terminal.

Owns what these commands say. While a daemon has the store open they go through its HTTP API, else
straight to the store. One thread.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from daemon.cache.offline_sessions import is_in_use, offline_catalogue
from daemon.config import parse_bytes
from daemon.errors import ConfigError

from .client import Client, ServerUnreachable
from .terminal import printable, size


class Sessions(Protocol):
    """What either way can do; sessions by id or name, answers as JSON has them."""

    def change(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Rename, pin or unpin."""
        ...

    def fork(self, name: str, fork: dict[str, Any]) -> dict[str, Any]:
        """A new session that goes on from another."""
        ...

    def wipe(self, name: str) -> dict[str, Any]:
        """Delete; what it was."""
        ...

    def export(self, name: str) -> Iterator[bytes]:
        """A session as a file."""
        ...

    def take_in(self, path: Path, session: str | None) -> dict[str, Any]:
        """Import a file."""
        ...


class ServedSessions:
    """Through a daemon."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def change(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Rename, pin or unpin."""
        return self._client.session("PATCH", name, json=changes)

    def fork(self, name: str, fork: dict[str, Any]) -> dict[str, Any]:
        """A new session that goes on from another."""
        return self._client.session("POST", f"{name}/fork", json=fork)

    def wipe(self, name: str) -> dict[str, Any]:
        """Delete; what it was."""
        wiped: dict[str, Any] = self._client.session("DELETE", name)["wiped"]
        return wiped

    def export(self, name: str) -> Iterator[bytes]:
        """A session as a file."""
        return self._client.export(name)

    def take_in(self, path: Path, session: str | None) -> dict[str, Any]:
        """Import a file."""
        return self._client.import_session(path, session)


class OfflineSessions:
    """Straight to a store that no daemon has open."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder = folder
        self._budget_bytes = budget_bytes

    def change(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Rename, pin or unpin."""
        with self._open() as catalogue:
            title, is_pinned = changes.get("title"), changes.get("pinned")
            return _row(catalogue.change(name, title=title, is_pinned=is_pinned))

    def fork(self, name: str, fork: dict[str, Any]) -> dict[str, Any]:
        """A new session that goes on from another."""
        with self._open() as catalogue:
            return _row(
                catalogue.fork(
                    name, fork["session"], position=fork["position"], title=fork["title"]
                )
            )

    def wipe(self, name: str) -> dict[str, Any]:
        """Delete; what it was."""
        with self._open() as catalogue:
            return _row(catalogue.wipe(name))

    def export(self, name: str) -> Iterator[bytes]:
        """A session as a file."""
        with self._open() as catalogue:
            yield from catalogue.export(name)

    def take_in(self, path: Path, session: str | None) -> dict[str, Any]:
        """Import a file."""
        num_bytes = path.stat().st_size if path.is_file() else 0
        with self._open(num_bytes) as catalogue:
            return _row(catalogue.take_in(path, session))

    def _open(self, import_bytes: int = 0) -> Any:
        return offline_catalogue(
            self._folder, budget_bytes=self._budget_bytes, import_bytes=import_bytes
        )


def register(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands."""

    def add(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> Any:
        parser = commands.add_parser(name, help=text, description=text, parents=[shared])
        parser.set_defaults(run=run)
        return parser

    _session(add("pin", "never evict a session", _pin(True)))
    _session(add("unpin", "let a session be evicted again", _pin(False)))
    rename = add("rename", "give a session a title", _rename)
    _session(rename)
    rename.add_argument("title")
    fork = add("fork", "make a session that goes on from another's checkpoint", _fork)
    _session(fork)
    fork.add_argument("name", help="its name; clients send it as prompt_cache_key")
    fork.add_argument("--at", type=int, metavar="TOKENS", help="where it leaves the other one")
    fork.add_argument("--title", default="", help="its title (default: the other's)")
    wipe = add("wipe", "delete a session: its checkpoints and sampled replies", _wipe)
    _session(wipe)
    export = add("export", "write a session to a file, for another machine", _export)
    _session(export)
    export.add_argument("file", type=Path)
    take_in = add("import", "take in a session that was exported", _import)
    take_in.add_argument("file", type=Path)
    take_in.add_argument("--as", dest="name", help="another name for it")


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Sessions]:
    """The store itself, or the daemon that has it open.

    Raises:
        ClientError: a daemon has it open and does not answer at --url.
    """
    offline = OfflineSessions(arguments.cache_dir, parse_bytes(arguments.cache_size))
    if not is_in_use(arguments.cache_dir):
        yield offline
        return
    with Client(arguments.url, api_key=arguments.api_key) as client:
        try:
            yield ServedSessions(client)
        except ServerUnreachable as error:
            raise ServerUnreachable(
                f"A daemon has {arguments.cache_dir} open; say where it listens with --url. {error}"
            ) from error


def _session(parser: Any) -> None:
    parser.add_argument("session", help="its id or name, as `qwend inspect` shows them")


def _pin(is_pinned: bool) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        with opened(arguments) as sessions:
            row = sessions.change(arguments.session, {"pinned": is_pinned})
        _say(row, "is pinned" if is_pinned else "is no longer pinned")

    return run


def _rename(arguments: argparse.Namespace) -> None:
    with opened(arguments) as sessions:
        row = sessions.change(arguments.session, {"title": arguments.title})
    _say(row, f"is titled {row['title']!r}")


def _fork(arguments: argparse.Namespace) -> None:
    fork = {"session": arguments.name, "position": arguments.at, "title": arguments.title}
    with opened(arguments) as sessions:
        row = sessions.fork(arguments.session, fork)
    _say(row, f"goes on from {arguments.session} at {row['num_tokens']:,} tokens")


def _wipe(arguments: argparse.Namespace) -> None:
    with opened(arguments) as sessions:
        row = sessions.wipe(arguments.session)
    _say(row, f"is wiped: {len(row['checkpoints'])} checkpoints, {size(row['num_bytes'])}")


def _export(arguments: argparse.Namespace) -> None:
    """To a file beside the target first, so that what is there is whole."""
    part = arguments.file.with_name(arguments.file.name + ".part")
    try:
        with opened(arguments) as sessions, part.open("wb") as file:
            for piece in sessions.export(arguments.session):
                file.write(piece)
        part.replace(arguments.file)
    except OSError as error:
        raise ConfigError(f"{arguments.file}: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)
    print(f"{arguments.file}: {size(arguments.file.stat().st_size)}")


def _import(arguments: argparse.Namespace) -> None:
    with opened(arguments) as sessions:
        row = sessions.take_in(arguments.file, arguments.name)
    _say(row, f"has {row['num_tokens']:,} tokens, {size(row['num_bytes'])}")


def _say(row: dict[str, Any], what: str) -> None:
    print(printable(f"{row['id']} ({row['session'] or row['title'] or '-'}) {what}."))


def _row(row: object) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(row)
    return built
