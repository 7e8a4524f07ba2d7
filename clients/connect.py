"""`qwend connect AGENT`: points a coding agent at a running server.

Owns the command: asks the server what it serves, then prints the agent's settings, or merges them
into its files. One thread.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .agent_settings import AGENTS, Endpoint, FileSettings, path_of
from .client import DEFAULT_URL, Client, ClientError
from .config_files import merged, rendered, replace


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = _parser().parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        endpoint = ask(arguments.url, arguments.api_key)
        connect(arguments.agent, endpoint, arguments.home, console, write=arguments.write)
    except ClientError as error:
        Console(stderr=True, soft_wrap=True).print(f"qwend connect: {error}", markup=False)
        return 1
    return 0


def ask(url: str, api_key: str) -> Endpoint:
    """What a running server serves.

    Raises:
        ClientError: none answers, or it wants a key.
    """
    with Client(url, api_key=api_key) as client:
        [model, *_] = client.models()
        return Endpoint(
            url=client.url,
            model=model["id"],
            context_length=model["context_length"],
            api_key=api_key,
        )


def connect(name: str, endpoint: Endpoint, home: Path, console: Console, *, write: bool) -> None:
    """Print an agent's settings, or write them.

    Raises:
        ConfigFileError: a file is left as it is, and so are those after it.
    """
    agent = AGENTS[name]
    files = agent.files(endpoint)
    if write:
        # All are read first, so that one that cannot be merged leaves all as they are.
        texts = [merged(path_of(file, home), file.settings) for file in files]
        for file, text in zip(files, texts, strict=True):
            _write(path_of(file, home), text, console)
    else:
        for file in files:
            _show(file, home, console)
    if note := agent.note(endpoint):
        console.print(note, markup=False)
    limits = f"{endpoint.context_length:,} tokens, compacted at {endpoint.compact_at:,}"
    console.print(f"{endpoint.model} at {endpoint.url}, {limits}.", markup=False)
    hint = "Start it with" if write else "Merge this with --write, or by hand; then start"
    console.print(f"{hint}: {agent.start}", markup=False)


def _write(path: Path, text: str, console: Console) -> None:
    if path.exists() and path.read_text() == text:
        console.print(f"{path} says so already.", markup=False)
        return
    backup = replace(path, text)
    before = f" (before: {backup.name})" if backup else ""
    console.print(f"{path} written{before}.", markup=False)


def _show(file: FileSettings, home: Path, console: Console) -> None:
    path = path_of(file, home)
    console.print(f"# {path}", markup=False)
    console.print(rendered(path, file.settings), markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwend connect",
        description="Point a coding agent at a running server: endpoint, model, and limits that "
        "fit its context.",
    )
    parser.add_argument("agent", choices=tuple(AGENTS), metavar="AGENT", help=", ".join(AGENTS))
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    parser.add_argument("--api-key", default="", help="one of the server's, if it has keys")
    parser.add_argument(
        "--write", action="store_true",
        help="merge into the agent's own files, each kept as it was in a copy beside it",
    )  # fmt: skip
    parser.add_argument(
        "--home", type=Path, default=Path.home(), help="where the agent's files are (%(default)s)"
    )
    return parser
