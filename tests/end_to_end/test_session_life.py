"""A user looks after sessions from the terminal while a daemon has the store open, and takes one to
another machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, StartDaemon, qwend

from clients.inspect_cache import main

QUESTION = {"role": "user", "content": "".join(f"def step_{i}():\n    pass\n" for i in range(60))}


def ask(daemon: DaemonProcess, session: str) -> int:
    answer = daemon.http.post(
        "/v1/chat/completions",
        json={"messages": [QUESTION], "max_tokens": 2, "prompt_cache_key": session},
    )
    used: dict[str, Any] = answer.raise_for_status().json()["usage"]
    return int(used["prompt_tokens_details"]["cached_tokens"])


def test_from_the_terminal(
    start_daemon: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process but for the last command: the daemon is another one all the same."""
    store, file = tmp_path / "store", tmp_path / "work.qwend"
    with start_daemon() as daemon:

        def inspect(*words: str | Path) -> str:
            status = main([*map(str, words), "--cache-dir", str(store), "--url", daemon.url])
            shown = capsys.readouterr()
            assert (status, shown.err) == (0, "")
            return shown.out

        ask(daemon, "work")
        daemon.wait_until_written()
        (row,) = json.loads(inspect("--json"))["sessions"]
        assert (row["session"], row["title"]) == ("work", "def step_0():")
        assert "is pinned" in inspect("pin", "work")
        assert "goes on from work" in inspect("fork", "work", "try")
        inspect("export", "work", file)
        assert "never_seen" in inspect("why")
        request = daemon.http.get("/v1/cache/requests").json()["data"][0]["request"]
        assert "Nothing like it was seen before." in inspect("why", request[:8])
        body = tmp_path / "body.json"
        body.write_text(json.dumps({"messages": [QUESTION]}))
        assert "tokens reused from memory" in " ".join(inspect("plan", body).split())
        assert "is wiped" in inspect("wipe", "try")
        assert "is wiped" in inspect("wipe", "work")
        assert ask(daemon, "work") == 0
        assert daemon.stop() == 0
    with start_daemon(cache_dir=tmp_path / "elsewhere") as daemon:
        elsewhere = ["--cache-dir", str(tmp_path / "elsewhere")]
        assert main(["pin", "work", *elsewhere, "--url", "http://127.0.0.1:9"]) == 1
        assert "say where it listens with --url" in capsys.readouterr().err
        taken = qwend("inspect", "import", file, *elsewhere, "--url", daemon.url)
        assert "(work) has" in taken.stdout
        assert ask(daemon, "work") > 300
        assert daemon.stop() == 0
