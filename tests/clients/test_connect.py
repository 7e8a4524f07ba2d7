"""Agents' own files: what `qwend connect` puts into them, and what it leaves as it was."""

import io
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from clients.agent_settings import AGENTS, Endpoint, path_of
from clients.config_files import ConfigFileError, merged, rendered, replace
from clients.connect import connect

LOCAL = Endpoint(url="http://127.0.0.1:8080", model="tiny-coder", context_length=32_768)
KEYED = Endpoint(url="http://box:9", model="Qwen3.5-9B", context_length=262_144, api_key="secret")


def load(path: Path) -> Any:
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
    return readers.get(path.suffix, YAML(typ="safe").load)(path.read_text())


def run(name: str, home: Path, endpoint: Endpoint = LOCAL, *, write: bool = True) -> str:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    connect(name, endpoint, home, console, write=write)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("context", [2048, 32_768, 262_144, 1_000_000])
def test_limits_leave_room_for_a_reply(context: int) -> None:
    endpoint = Endpoint(url="", model="m", context_length=context)
    assert 0 < endpoint.compact_at < context - endpoint.max_output
    assert endpoint.compact_at >= context // 2


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("endpoint", [LOCAL, KEYED], ids=["local", "keyed"])
def test_new_files_hold_endpoint_model_and_limits(
    name: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    said = run(name, tmp_path, endpoint)
    files = [path_of(file, tmp_path) for file in AGENTS[name].files(endpoint)]
    text = "".join(str(load(path)) for path in files)
    assert endpoint.url in text
    assert endpoint.model in text
    assert name == "claude-code" or str(endpoint.context_length) in text
    assert name == "codex" or endpoint.key in text
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert AGENTS[name].start in said
    assert f"{endpoint.compact_at:,}" in said


@pytest.mark.parametrize("name", AGENTS)
def test_printing_writes_nothing(name: str, tmp_path: Path) -> None:
    said = run(name, tmp_path, write=False)
    assert list(tmp_path.iterdir()) == []
    for file in AGENTS[name].files(LOCAL):
        assert rendered(path_of(file, tmp_path), file.settings) in said


@pytest.mark.parametrize("name", AGENTS)
def test_a_second_time_changes_nothing(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert "says so already" in run(name, tmp_path)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


# ── what is there stays ───────────────────────────────────────────────────────────────────────

CODEX = """\
# my settings
model = "gpt-5"  # the default one
approval_policy = "on-request"

[model_providers.other]
name = "other"
base_url = "https://other.example/v1"

[mcp_servers.docs]
command = "docs-server"  # local
"""

QWEN = {
    "$version": 3,
    "ui": {"theme": "GitHub"},
    "modelProviders": {
        "openai": [{"id": "other", "envKey": "OTHER"}, {"id": "tiny-coder", "x": 1}]
    },
}

CONTINUE = """\
name: Mine # my own
version: 2.0.0
schema: v1
models:
  # the big one
  - name: big
    provider: anthropic
    model: 'big-1'
rules:
  - Be brief
"""


def test_codex_keeps_comments_and_tables(tmp_path: Path) -> None:
    path = tmp_path / ".codex/config.toml"
    path.parent.mkdir()
    path.write_text(CODEX)
    run("codex", tmp_path)
    text, content = path.read_text(), load(path)
    for line in ("# my settings", "# the default one", "# local", 'command = "docs-server"'):
        assert line in text
    assert content["model"] == "tiny-coder"
    assert content["model_context_window"] == 32_768
    assert content["approval_policy"] == "on-request"
    assert content["model_providers"]["other"]["base_url"] == "https://other.example/v1"
    assert content["model_providers"]["qwend"]["wire_api"] == "responses"
    (backup,) = path.parent.glob("*.bak")
    assert backup.read_text() == CODEX


def test_qwen_code_keeps_other_models(tmp_path: Path) -> None:
    path = tmp_path / ".qwen/settings.json"
    path.parent.mkdir()
    path.write_text(json.dumps(QWEN))
    run("qwen-code", tmp_path)
    content = load(path)
    assert content["ui"] == {"theme": "GitHub"}
    other, ours = content["modelProviders"]["openai"]
    assert other == {"id": "other", "envKey": "OTHER"}
    assert ours["x"] == 1
    assert ours["generationConfig"]["contextWindowSize"] == 32_768
    assert list(content)[:3] == ["$version", "ui", "modelProviders"]


def test_continue_keeps_comments_quotes_and_its_name(tmp_path: Path) -> None:
    path = tmp_path / ".continue/config.yaml"
    path.parent.mkdir()
    path.write_text(CONTINUE)
    run("continue", tmp_path)
    text, content = path.read_text(), load(path)
    for piece in ("# my own", "# the big one", "'big-1'", "- Be brief"):
        assert piece in text
    assert (content["name"], content["version"]) == ("Mine", "2.0.0")
    assert [model["name"] for model in content["models"]] == ["big", "qwend"]


def test_claude_code_keeps_other_variables(tmp_path: Path) -> None:
    path = tmp_path / ".claude/settings.json"
    path.parent.mkdir()
    path.write_text('{"permissions": {"allow": ["Bash"]}, "env": {"FOO": "1"}}')
    run("claude-code", tmp_path, KEYED)
    content = load(path)
    assert content["permissions"] == {"allow": ["Bash"]}
    assert content["env"]["FOO"] == "1"
    assert content["env"]["ANTHROPIC_BASE_URL"] == "http://box:9"
    assert content["env"]["ANTHROPIC_AUTH_TOKEN"] == "secret"
    assert all(isinstance(value, str) for value in content["env"].values())


def test_opencode_takes_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / ".config/opencode/opencode.jsonc"
    path.parent.mkdir(parents=True)
    path.write_text('{"theme": "dark"}')
    run("opencode", tmp_path)
    assert load_json(path)["theme"] == "dark"
    assert not (path.parent / "opencode.json").exists()


def load_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles.toml"
    target.write_text('model = "x"\n')
    target.chmod(0o640)
    link = tmp_path / ".codex/config.toml"
    link.parent.mkdir()
    link.symlink_to(target)
    run("codex", tmp_path)
    assert link.is_symlink()
    assert load(target)["model"] == "tiny-coder"
    assert target.stat().st_mode & 0o777 == 0o640


# ── what is refused ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".claude/settings.json", '{"a": 1, // why\n "b": 2}'),
        (".claude/settings.json", "[1, 2]"),
        (".claude/settings.json", '{"a": '),
        (".codex/config.toml", "model = "),
        (".continue/config.yaml", "models: [\n"),
        (".continue/config.yaml", "- a\n- b\n"),
        (".aider.conf.yml", "just text\n"),
    ],
)
def test_a_file_that_would_lose_something_is_left(name: str, text: str, tmp_path: Path) -> None:
    agents = {"claude": "claude-code", "codex": "codex", "continue": "continue", "aider": "aider"}
    agent = next(value for key, value in agents.items() if key in name)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ConfigFileError, match="left as it is"):
        run(agent, tmp_path)
    assert path.read_text() == text
    assert [found for found in path.parent.iterdir() if found != path] == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigFileError, match="cannot be written"):
        replace(tmp_path / "file/settings.json", "{}")


def test_the_one_that_cannot_be_merged_keeps_the_others_from_being_written(tmp_path: Path) -> None:
    (tmp_path / ".aider.model.metadata.json").write_text("[]")
    with pytest.raises(ConfigFileError):
        run("aider", tmp_path)
    assert not (tmp_path / ".aider.conf.yml").exists()


def test_merging_needs_no_file(tmp_path: Path) -> None:
    assert json.loads(merged(tmp_path / "a.json", {"a": {"b": 1}})) == {"a": {"b": 1}}
    assert tomllib.loads(merged(tmp_path / "a.toml", {"a": {"b": 1}})) == {"a": {"b": 1}}
