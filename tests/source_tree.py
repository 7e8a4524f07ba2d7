"""The source of daemon/ and clients/ as data: files, imports, functions; for tests of its form."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Function(NamedTuple):
    """A function or method, and its length in lines without decorators."""

    place: str
    num_lines: int


class Import(NamedTuple):
    """A module of ours, or another's package, that a module imports; and where."""

    place: str
    importer: str
    imported: str


@cache
def python_files() -> dict[str, Path]:
    """Dotted name of each module of `daemon` and `clients`, and its file."""
    paths = sorted(
        path for folder in ("daemon", "clients") for path in (ROOT / folder).rglob("*.py")
    )
    return {_module_name(path): path for path in paths}


@cache
def tree(module: str) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(python_files()[module].read_text(), filename=module)


def place(module: str, node: ast.AST) -> str:
    """`file:line`, as editors and terminals understand it."""
    return f"{python_files()[module].relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@cache
def imports() -> tuple[Import, ...]:
    """Every import statement, wherever it stands, resolved to the module it names."""
    return tuple(
        Import(place(module, node), module, imported)
        for module in python_files()
        for node in ast.walk(tree(module))
        for imported in _imported(module, node)
    )


def functions() -> list[Function]:
    """Every function and method, nested ones too."""
    return [
        Function(f"{place(module, node)} {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for module in python_files()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(module: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (_ours(alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = _ours(_absolute(module, node))
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            yield submodule if submodule in python_files() else source


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = python_files()[module].name == "__init__.py"
    package = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def _ours(name: str) -> str:
    """The wheel calls clients/ qwend_clients."""
    return name.replace("qwend_clients", "clients", 1) if name.startswith("qwend_clients") else name
