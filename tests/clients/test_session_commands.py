"""Sessions changed from a terminal while no daemon runs; with one, see tests/end_to_end."""

from pathlib import Path

import pytest
from cache.cache_harness import open_cache, saved_prompt

from clients.client import Client, ClientError
from clients.inspect_cache import main, read_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    cache = open_cache(folder)
    saved_prompt(cache, 3)
    cache.suggest_title("", "Fix the parser")
    cache.close()
    return folder


def run(folder: Path, *arguments: str) -> int:
    return main([*arguments, "--cache-dir", str(folder)])


def only_id(folder: Path) -> str:
    view = read_store(folder, verify=False)
    assert view is not None
    (session,) = view.sessions
    return session.id


def test_pin_rename_fork_wipe(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = only_id(store)
    assert run(store, "pin", name) == 0
    assert run(store, "rename", name, "Parser") == 0
    assert run(store, "fork", name, "mine", "--at", "200") == 0
    said = capsys.readouterr().out
    assert "is pinned" in said
    assert "is titled 'Parser'" in said
    assert f"goes on from {name} at 192 tokens" in said
    view = read_store(store, verify=True)
    assert view is not None
    assert view.damaged == ()
    pinned, fork = sorted(view.sessions, key=lambda row: row.session)
    assert (pinned.is_pinned, pinned.title, fork.session) == (True, "Parser", "mine")
    assert run(store, "unpin", name) == 0
    assert run(store, "wipe", "mine") == 0
    assert run(store, "wipe", name) == 0
    assert "is wiped: 1 checkpoints" in capsys.readouterr().out
    view = read_store(store, verify=True)
    assert view is not None
    assert (view.num_checkpoints, view.num_pages) == (0, 0)


def test_export_and_import(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, file = only_id(store), tmp_path / "a.qwend"
    assert run(store, "export", name, str(file)) == 0
    assert run(store, "wipe", name) == 0
    assert run(store, "import", str(file), "--as", "back") == 0
    assert "(back) has 192 tokens" in capsys.readouterr().out
    assert run(store, "import", str(file.with_name("none"))) == 1
    assert capsys.readouterr().err.endswith("none: No such file or directory.\n")
    file.write_bytes(file.read_bytes()[:-1])
    assert run(store, "import", str(file)) == 1
    assert "damaged or cut short" in capsys.readouterr().err
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("command", [["pin", "none"], ["wipe", "none"], ["export", "none", "f"]])
def test_an_unknown_session_is_one_line(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    arguments = [str(tmp_path / word) if word == "f" else word for word in command]
    assert run(store, *arguments) == 1
    assert capsys.readouterr().err == "qwend: There is no session 'none'.\n"
    assert run(tmp_path / "nowhere", *arguments) == 1
    assert "There are no checkpoints in" in capsys.readouterr().err


def test_the_table_shows_titles_pins_and_parents(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = only_id(store)
    run(store, "pin", name)
    run(store, "fork", name, "mine")
    capsys.readouterr()
    assert main(["--cache-dir", str(store)]) == 0
    shown = capsys.readouterr().out
    for piece in (name, "Fix the parser", "pinned", f"from {name}"):
        assert piece in shown


def test_a_file_that_is_not_there_is_told_before_it_is_sent(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ClientError, match="No such file"):
        client.import_session(tmp_path / "nothing")
