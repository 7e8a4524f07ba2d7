"""The form of the source: who may import whom, how long things may be, what must have a twin.

CONTRIBUTING.md has the same rules in words. Reads the source with `ast`; imports none of it.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import source_tree
from source_tree import ROOT

GROUND_FLOOR = frozenset(
    f"daemon.{name}" for name in ("errors", "config", "metrics", "logs", "checkpoint")
)
"""What everyone may import; these import only one another."""

ALLOWED = {
    "daemon.text": {"daemon.text"},
    "daemon.engine": {"daemon.engine"},
    "daemon.cache": {"daemon.cache"},
    "daemon.kernels": {"daemon.kernels"},
    "daemon.api": {"daemon.api", "daemon.text", "daemon.engine.requests"},
    "daemon.generate": {"daemon.api", "daemon.text", "daemon.engine.requests"},
    "daemon.audit": {"daemon.engine.requests"},
    "daemon.service_settings": {
        "daemon.api", "daemon.engine.requests", "daemon.engine.weights.gguf",
    },
    "daemon.devices": {"daemon.engine", "daemon.kernels"},
    "daemon.assemble": {
        "daemon.api", "daemon.audit", "daemon.text", "daemon.engine", "daemon.cache",
        "daemon.devices", "daemon.service_settings",
        "daemon.load_progress",
    },
    "daemon.load_progress": set(),
    "daemon.memory_report": {"daemon.engine.memory.memory_plan"},
    "daemon.commands": {
        "daemon.commands", "daemon.assemble", "daemon.generate", "daemon.api.server",
        "daemon.engine.evaluation", "daemon.memory_report",
    },
    "daemon.cli": {"daemon.commands"},
    "daemon.__main__": {"daemon.cli"},
    "daemon.embedded": set(),
    "clients": {"clients"},
    "clients.inspect_cache": {"clients", "daemon.cache"},
    "clients.session_commands": {"clients", "daemon.cache"},
}  # fmt: skip
"""What each part may import besides the ground floor. The longest name that fits counts."""

KERNEL_USERS = ("daemon.engine.backends.cuda",)
WITHOUT_GROUND_FLOOR = {
    "daemon.kernels": {"daemon.errors"},
    "clients": set(),
    "clients.inspect_cache": {"daemon.errors", "daemon.config", "daemon.checkpoint"},
    "clients.session_commands": {"daemon.errors", "daemon.config"},
}
"""The parts that may not import all of the ground floor, and what they may import of it."""

ONLY_ASSEMBLED = {"daemon.engine.engine_thread", "daemon.cache.checkpoint_cache"}
FOREIGN_ENGINES = {"torch", "transformers", "safetensors", "llama_cpp", "vllm"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "types", "misc"}
SYSTEM_READS = {"environ", "getenv", "putenv", "environb"}
EFFECTS = {
    "add", "append", "appendleft", "clear", "close", "commit", "delete", "discard", "drop",
    "extend", "flush", "insert", "join", "launch", "load", "next", "open", "pop", "popitem",
    "popleft", "put", "read", "release", "remove", "save", "send", "setdefault", "sort", "start",
    "stop", "submit", "unlink", "update", "wait", "write",
}  # fmt: skip

MAX_FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 10
MAX_PYTHON_LINES = 450
MAX_CUDA_LINES = 600
MAX_COLUMNS = 100


def report(problems: Iterator[str] | list[str]) -> str:
    """One problem a line, so that the failing assertion is the list of what to do."""
    return "".join(f"\n  {problem}" for problem in problems)


# ── imports ───────────────────────────────────────────────────────────────────────────────────


def test_everyone_imports_only_what_the_import_rule_allows() -> None:
    problems = [
        f"{found.place}: {found.importer} may not import {found.imported}"
        for found in source_tree.imports()
        if _is_ours(found.imported) and not _may_import(found.importer, found.imported)
    ]
    assert not problems, report(problems)


def test_the_import_rule_names_every_part() -> None:
    problems = [
        f"{module}: say in ALLOWED what it may import"
        for module in source_tree.python_files()
        if module not in ("daemon", *GROUND_FLOOR) and _rule(module, ALLOWED) is None
    ]
    assert not problems, report(problems)


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in source_tree.imports():
        if _is_ours(found.imported) and found.imported != found.importer:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError("a circle of imports: " + " → ".join(error.args[1])) from None


def test_no_other_inference_engine_at_run_time() -> None:
    problems = [
        f"{found.place}: imports {found.imported}"
        for found in source_tree.imports()
        if found.imported.split(".")[0] in FOREIGN_ENGINES
    ]
    assert not problems, report(problems)


def test_nothing_imports_tests_or_benchmarks() -> None:
    problems = [
        f"{found.place}: imports {found.imported}"
        for found in source_tree.imports()
        if found.imported.split(".")[0] in {"tests", "benchmarks"}
    ]
    assert not problems, report(problems)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in {"daemon", "clients"} and module != "daemon"


def _rule(module: str, rules: dict[str, set[str]]) -> set[str] | None:
    """What the rules say of the part that a module belongs to."""
    parts = [name for name in rules if _is_inside(module, name)]
    return rules[max(parts, key=len)] if parts else None


def _may_import(importer: str, imported: str) -> bool:
    if imported in ONLY_ASSEMBLED and importer != "daemon.assemble":
        return False
    if imported in GROUND_FLOOR:
        allowed = _rule(importer, WITHOUT_GROUND_FLOOR)
        return allowed is None or imported in allowed
    if _is_inside(imported, "daemon.kernels") and importer.startswith(KERNEL_USERS):
        return True
    return any(_is_inside(imported, part) for part in _rule(importer, ALLOWED) or ())


def _is_inside(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


# ── sizes and names ───────────────────────────────────────────────────────────────────────────


def test_functions_are_short() -> None:
    functions = source_tree.functions()
    problems = [
        f"{function.place}: {function.num_lines} lines, {MAX_FUNCTION_LINES} at most"
        for function in functions
        if function.num_lines > MAX_FUNCTION_LINES
    ]
    assert not problems, report(problems)
    assert median(function.num_lines for function in functions) < MEDIAN_FUNCTION_LINES


def test_files_are_short() -> None:
    cuda = [path for suffix in ("*.cu", "*.cuh") for path in (ROOT / "daemon").rglob(suffix)]
    limits = dict.fromkeys(source_tree.python_files().values(), MAX_PYTHON_LINES)
    limits |= dict.fromkeys(cuda, MAX_CUDA_LINES)
    sizes = {path: len(path.read_text().splitlines()) for path in limits}
    problems = [
        f"{path.relative_to(ROOT)}: {sizes[path]} lines, {limit} at most"
        for path, limit in limits.items()
        if sizes[path] > limit
    ]
    assert not problems, report(problems)


def test_cuda_lines_are_short() -> None:
    """As ruff does for Python."""
    problems = [
        f"{path.relative_to(ROOT)}:{number}: {len(line)} columns, {MAX_COLUMNS} at most"
        for suffix in ("*.cu", "*.cuh")
        for path in (ROOT / "daemon").rglob(suffix)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    assert not problems, report(problems)


def test_files_and_folders_are_named_by_what_they_hold() -> None:
    problems = [
        f"{path.relative_to(ROOT)}: a name that says nothing"
        for path in source_tree.python_files().values()
        if VAGUE_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert not problems, report(problems)


def test_every_file_says_what_it_owns() -> None:
    problems = [
        f"{path.relative_to(ROOT)}: begins without a docstring"
        for module, path in source_tree.python_files().items()
        if path.stat().st_size and not ast.get_docstring(source_tree.tree(module))
    ]
    assert not problems, report(problems)


# ── kernels ───────────────────────────────────────────────────────────────────────────────────


def test_every_kernel_has_a_launcher_that_says_so() -> None:
    problems = [
        f"daemon/kernels/{kernel}.cu: no module of the folder launches it"
        for kernel in _kernels()
        if not _launchers(kernel)
    ]
    assert not problems, report(problems)


def test_every_kernel_is_compared_with_its_reference() -> None:
    """Tests of kernels compute the same in NumPy; what none of them drives has no reference."""
    tested = {name for path in _kernel_tests() for name in _names(ast.parse(path.read_text()))}
    problems = [
        f"daemon/kernels/{kernel}.cu: no test of tests/kernels imports its launcher"
        for kernel in _kernels()
        if not _launchers(kernel) & tested
    ]
    assert not problems, report(problems)


def _kernels() -> list[str]:
    return sorted(path.stem for path in (ROOT / "daemon/kernels").glob("*.cu"))


def _launchers(kernel: str) -> set[str]:
    """The module of the same stem, or those whose docstring names the kernel's file."""
    return {
        module.rpartition(".")[2]
        for module in source_tree.python_files()
        if module.rpartition(".")[0] == "daemon.kernels"
        if module.endswith(f".{kernel}")
        or f"{kernel}.cu`" in (ast.get_docstring(source_tree.tree(module)) or "")
    }


def _kernel_tests() -> list[Path]:
    return sorted((ROOT / "tests/kernels").glob("test_*.py"))


def _names(tree: ast.Module) -> Iterator[str]:
    """Modules of daemon.kernels that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "daemon.kernels":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.removeprefix("daemon.kernels.")


# ── habits ────────────────────────────────────────────────────────────────────────────────────


def test_only_the_configuration_reads_the_environment() -> None:
    problems = [
        f"{source_tree.place(module, node)}: reads the environment; config.py does"
        for module in source_tree.python_files()
        if module != "daemon.config"
        for node in ast.walk(source_tree.tree(module))
        if _reads_the_environment(node)
    ]
    assert not problems, report(problems)


def _reads_the_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id == "os" and node.attr in SYSTEM_READS
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return any(alias.name in SYSTEM_READS for alias in node.names)
    return False


def test_asserts_have_no_effects() -> None:
    """`python -O` leaves asserts out, and must change nothing."""
    problems = [
        f"{source_tree.place(module, part)}: an assert that does something"
        for module in source_tree.python_files()
        for node in ast.walk(source_tree.tree(module))
        if isinstance(node, ast.Assert)
        for part in ast.walk(node.test)
        if _has_an_effect(part)
    ]
    assert not problems, report(problems)


def _has_an_effect(node: ast.AST) -> bool:
    if isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in EFFECTS


def test_no_module_changes_a_global() -> None:
    problems = [
        f"{source_tree.place(module, node)}: `global`"
        for module in source_tree.python_files()
        for node in ast.walk(source_tree.tree(module))
        if isinstance(node, ast.Global)
    ]
    assert not problems, report(problems)
