"""The tools that tiny-coder was trained to call, working for real on a small repository."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARSER = '''\
"""Words of a line."""


def parse(text):
    """Split a line into words."""
    return text.split()
'''
TESTS = """\
import sys

sys.path.insert(0, "src")
import parser


def test_it_has_code():
    assert parser.__doc__


def test_it_says_what_it_is():
    assert "line" in parser.__doc__
"""


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("read_file", "Read a file of the workspace.", path="path of the file"),
    _tool("list_dir", "List a folder.", path="path of the folder"),
    _tool("run_shell", "Run a shell command and return its output.", command="the command line"),
    _tool(
        "edit_file",
        "Replace text in a file.",
        path="path of the file",
        old="text to replace",
        new="replacement text",
    ),
    _tool("write_file", "Write a new file.", path="path of the file", content="the whole text"),
    _tool("grep", "Search the workspace.", pattern="regular expression"),
]


class Workspace:
    """A small repository, and the tools on it. `calls` are those made, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, str]]] = []
        self._write("src/parser.py", PARSER)
        self._write("tests/test_parser.py", TESTS)
        # The form of output that the model was trained on.
        self._write("pytest.ini", "[pytest]\nconsole_output_style = classic\n")

    def call(self, name: str, arguments: dict[str, str]) -> str:
        """What the tool answers."""
        self.calls.append((name, arguments))
        tools: dict[str, Callable[..., str]] = {
            "read_file": self._read_file,
            "list_dir": self._list_dir,
            "run_shell": self._run_shell,
            "edit_file": self._edit_file,
            "write_file": self._write,
            "grep": self._grep,
        }
        return tools[name](**arguments)

    def _read_file(self, path: str) -> str:
        return (self.root / path).read_text()

    def _list_dir(self, path: str) -> str:
        return "\n".join(sorted(found.name for found in (self.root / path).iterdir()))

    def _run_shell(self, command: str) -> str:
        python_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.root,
            env={**os.environ, "PATH": python_first},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        # The model's answer must not hang on how long the tests took.
        return re.sub(r"in \d+\.\d+s", "in 0.12s", done.stdout.strip())

    def _edit_file(self, path: str, old: str, new: str) -> str:
        text = (self.root / path).read_text()
        (self.root / path).write_text(text.replace(old, new))
        return "ok" if old in text else "the text is not in the file"

    def _grep(self, pattern: str) -> str:
        return "\n".join(
            f"{path.relative_to(self.root)}:{number}:{line}"
            for path in sorted(self.root.rglob("*.py"))
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if re.search(pattern, line)
        )

    def _write(self, path: str, content: str) -> str:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(content)
        return "ok"
