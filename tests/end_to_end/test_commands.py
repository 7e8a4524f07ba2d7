"""The commands beside `serve`, as a user types them."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from daemon_process import ROOT, StartDaemon, qwend


def test_generate_answers_on_standard_output(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--temperature", "0", "--cache-dir", tmp_path)
    done = qwend("generate", "Repeat exactly: Return the number of bytes.", *flags)
    assert (done.returncode, done.stdout) == (0, "Return the number of bytes.\n")
    assert done.stderr.strip() == "Repeat it."


def test_generate_leaves_its_checkpoints(tmp_path: Path) -> None:
    prompt = "Explain. " + "def step(queue): return queue.get()\n" * 20
    flags = ("--device", "cpu", "--max-tokens", "1", "--cache-dir", tmp_path)
    assert qwend("generate", prompt, *flags).returncode == 0
    document = json.loads(qwend("inspect", "--json", "--cache-dir", tmp_path).stdout)
    assert document["num_checkpoints"] >= 1


def test_logits_are_written_for_every_token(tmp_path: Path) -> None:
    tokens, logits = tmp_path / "tokens.npy", tmp_path / "logits.npy"
    np.save(tokens, np.array([8177, 5, 6, 7]))
    done = qwend("logits", "--device", "cpu", "--tokens", tokens, "--out", logits)
    assert done.returncode == 0, done.stderr
    written = np.load(logits)
    assert written.dtype == np.float32
    assert written.shape == (4, 8192)
    assert np.isfinite(written).all()


def test_inspect_while_the_daemon_runs_and_after(start_daemon: StartDaemon, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start_daemon() as daemon:
        text = "Explain. " + "def step(queue): return queue.get()\n" * 20
        daemon.openai.chat.completions.create(
            model="tiny-coder", messages=[{"role": "user", "content": text}], max_tokens=1
        )
        daemon.wait_until_written()
        running = qwend("inspect", "--cache-dir", store, "--verify")
        assert daemon.stop() == 0
    after = qwend("inspect", "--cache-dir", store, "--verify")
    for done in (running, after):
        assert done.returncode == 0, done.stderr
        assert "tiny-coder" in done.stdout
        assert "All records are sound." in done.stdout


def test_inspect_of_nothing(tmp_path: Path) -> None:
    done = qwend("inspect", "--cache-dir", tmp_path / "none")
    assert (done.returncode, done.stdout) == (0, f"No checkpoints in {tmp_path / 'none'}.\n")
    assert not (tmp_path / "none").exists()


def test_chat_keeps_the_conversation(start_daemon: StartDaemon) -> None:
    lines = "Remember the word falcon.\nWhich word did I ask you to remember?\n/stats\n/quit\n"
    with start_daemon() as daemon:
        done = qwend("chat", "--url", daemon.url, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "falcon" in done.stdout
    assert "hit rate" in done.stdout


def test_chat_without_a_server() -> None:
    done = qwend("chat", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "qwend serve" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [(), ("serve",), ("generate",), ("logits",), ("chat",)])
def test_help(command: tuple[str, ...]) -> None:
    done = qwend(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: qwend")


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert qwend("--version").stdout == f"qwend {project['version']}\n"


def test_connect_asks_the_daemon(start_daemon: StartDaemon, tmp_path: Path) -> None:
    with start_daemon("--ctx", "4096", "--api-key", "k") as daemon:
        flags = ("--url", daemon.url, "--api-key", "k", "--home", tmp_path)
        done = qwend("connect", "codex", "--write", *flags)
        refused = qwend("connect", "codex", "--url", daemon.url, "--home", tmp_path)
    assert done.returncode == 0, done.stderr
    content = tomllib.loads((tmp_path / ".codex/config.toml").read_text())
    assert content["model_context_window"] == 4096
    assert content["model_providers"]["qwend"]["base_url"] == f"{daemon.url}/v1"
    assert refused.returncode == 1
    assert "API key" in refused.stderr


def test_connect_without_a_server(tmp_path: Path) -> None:
    done = qwend("connect", "aider", "--url", "http://127.0.0.1:9", "--home", tmp_path)
    assert done.returncode == 1
    assert "qwend serve" in done.stderr
