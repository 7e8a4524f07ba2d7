"""The command line: finds the command and runs it; each is a file in commands/ or clients/.

Imports nothing heavy before it knows the command, so that `--help` is instant. Main thread.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from daemon import __version__
from daemon.commands import check, generate, logits, serve
from daemon.errors import QwendError

COMMANDS = (serve, generate, check, logits)
"""Each has `register(commands)`: it adds its flags and says what runs, which may give a status."""

CLIENT_COMMANDS = {
    "chat": ("qwend_clients.chat", "chat with a server"),
    "connect": ("qwend_clients.connect", "point a coding agent at a server"),
    "inspect": ("qwend_clients.inspect_cache", "show what the store holds"),
}
"""Commands that live in clients/ and read their own flags, with their help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in CLIENT_COMMANDS:
            client = import_module(CLIENT_COMMANDS[arguments[0]][0])
            return int(client.main(arguments[1:]))
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed) or 0
    except QwendError as error:
        print(f"qwend: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Refuses with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qwend",
        description="Serve Qwen 3.5 to coding agents from a GGUF file, and evaluate nothing twice.",
    )
    parser.add_argument("--version", action="version", version=f"qwend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    for name, (_, text) in CLIENT_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (see qwend {name} --help)", add_help=False)
    return parser
