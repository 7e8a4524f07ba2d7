"""What cannot be served is refused at the start: a status, one line on standard error, no trace."""

import socket
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from daemon_process import ROOT, StartDaemon, qwend

EMBEDDED = ROOT / "daemon/embedded/tiny-coder-Q4_K_M.gguf"
MEBIBYTE = 2**20


def refusal(*arguments: str | Path) -> str:
    """The one line that says why a command ends at once."""
    done = qwend(*arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line


def missing(path: Path) -> None:
    """Makes nothing."""


def folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("The weights are elsewhere.\n" * 100)


def cut_in_its_metadata(path: Path) -> None:
    path.write_bytes(EMBEDDED.read_bytes()[:40_000])


def cut_in_its_weights(path: Path) -> None:
    path.write_bytes(EMBEDDED.read_bytes()[: 5 * MEBIBYTE])


def other_architecture(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing, "No such file"),
        (folder, "Is a directory"),
        (empty, "empty"),
        (text, "not a GGUF file"),
        (cut_in_its_metadata, "truncated"),
        (cut_in_its_weights, "truncated"),
        (other_architecture, "architecture 'llama' is not supported"),
    ],
)
def test_a_file_that_is_no_model(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    line = refusal("serve", "--device", "cpu", "--port", "0", "--no-cache", "--model", path)
    assert line.startswith("qwend: error: ")
    assert says in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--ctx", "-1"), "--ctx"),
        (("--ctx", "many"), "--ctx"),
        (("--ctx", "999999"), "32768"),
        (("--parallel", "0"), "--parallel"),
        (("--port", "http"), "--port"),
        (("--port", "70000"), "65535"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--cache-size", "much"), "'much'"),
        (("--cache-size", "1K"), "too small"),
        (("--checkpoint-interval", "100"), "64"),
        (("--chat-template-file", "/no/such/template"), "/no/such/template"),
        (("--fast",), "--fast"),
    ],
)
def test_a_flag_that_cannot_be_honoured(tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    assert says in refusal(
        "serve", "--device", "cpu", "--port", "0", "--cache-dir", tmp_path, *flags
    )


@pytest.mark.parametrize("arguments", [(), ("sing",), ("generate",), ("logits", "--out", "x")])
def test_an_incomplete_command(arguments: tuple[str, ...]) -> None:
    assert "--help" in refusal(*arguments)


def test_a_template_that_does_not_compile(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for %}")
    flags = ("--no-cache", "--chat-template-file", template)
    assert "does not compile" in refusal("serve", "--device", "cpu", "--port", "0", *flags)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = refusal("serve", "--device", "cpu", "--no-cache", "--port", str(port))
    assert f"Port {port}" in line
    assert "--port" in line


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        assert str(path) in refusal("serve", "--device", "cpu", "--port", "0", "--cache-dir", path)
    assert file.stat().st_size == 0


def test_a_store_that_another_daemon_holds(start_daemon: StartDaemon, tmp_path: Path) -> None:
    with start_daemon() as daemon:
        line = refusal("serve", "--device", "cpu", "--port", "0", "--cache-dir", tmp_path / "store")
        assert str(tmp_path / "store") in line
        assert daemon.http.get("/health").json()["status"] == "ok"


def test_a_store_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not LMDB" * 4096)
    assert str(tmp_path) in refusal(
        "serve", "--device", "cpu", "--port", "0", "--cache-dir", tmp_path
    )
    assert (tmp_path / "data.mdb").read_bytes() == b"not LMDB" * 4096
