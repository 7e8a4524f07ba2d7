import json
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from clients.inspect_cache import main
from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.checkpoint import Snapshot

MODEL = b"a model of tests"


@pytest.fixture
def cache(tmp_path: Path) -> CheckpointCache:
    cache = CheckpointCache.open(
        tmp_path, CacheLimits(budget_bytes=64 << 20), fingerprint=MODEL, model_name="tiny"
    )
    timeline = cache.timeline(range(200), "work \x1b[31m")
    timeline.save(Snapshot(64, "prompt", 1, b"state", {0: b"page"}), "system")
    timeline.save(Snapshot(192, "decode", 1, b"state", {1: b"one", 2: b"two"}), "reply")
    cache.flush()
    return cache


def run(folder: Path, *flags: str) -> int:
    return main(["--cache-dir", str(folder), *flags])


def test_tables(cache: CheckpointCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.close()
    assert run(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "2 checkpoints and 3 KV pages" in shown
    assert "tiny (61206d6f6465): 2" in shown
    for piece in ("work ?[31m", "192", "s ago"):
        assert piece in shown
    assert "\x1b" not in shown
    assert "sound" not in shown


def test_one_session(
    cache: CheckpointCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.close()
    assert run(tmp_path, "show", "work \x1b[31m") == 0
    shown = capsys.readouterr().out
    for piece in ("system", "on the grid", "reply", "decoded", "192 tokens"):
        assert piece in shown
    assert run(tmp_path, "show", "none") == 1
    assert "There is no session 'none'" in capsys.readouterr().err


def test_json(cache: CheckpointCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.close()
    assert run(tmp_path, "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert view["models"] == [{"fingerprint": MODEL.hex(), "name": "tiny", "num_checkpoints": 2}]
    (session,) = view["sessions"]
    assert (session["session"], session["num_tokens"]) == ("work \x1b[31m", 192)
    assert [(c["position"], c["reason"], c["born"]) for c in session["checkpoints"]] == [
        (64, "system", "prompt"),
        (192, "reply", "decode"),
    ]
    assert (view["damaged"], view["with_payloads"]) == ([], False)
    assert 0 < view["num_bytes"] <= view["file_bytes"] * 2


def test_verify(cache: CheckpointCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.close()
    assert run(tmp_path, "--verify") == 0
    assert "All records are sound." in capsys.readouterr().out
    with (
        lmdb.open(str(tmp_path), max_dbs=9) as env,
        env.begin(write=True, db=env.open_db(b"page_payloads")) as txn,
    ):
        key, _ = next(iter(txn.cursor()))
        txn.put(key, b"xxxx")
    assert run(tmp_path, "--verify") == 1
    shown = capsys.readouterr().out
    assert "Damaged" in shown
    assert key[:24].hex()[:20] in shown.replace("\n", "")
    assert run(tmp_path, "--verify", "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["damaged"]) == 1


def test_damage_shows_without_reading_payloads(
    cache: CheckpointCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.catalogue.change("work \x1b[31m", title="named", is_pinned=False)
    cache.close()
    for table in (b"sessions", b"models", b"writes"):
        with (
            lmdb.open(str(tmp_path), max_dbs=11) as env,
            env.begin(write=True, db=env.open_db(table)) as txn,
        ):
            key, value = next(iter(txn.cursor()))
            txn.put(key, value[:-1] + bytes((value[-1] ^ 1,)))
    assert run(tmp_path, "--json") == 1
    view = json.loads(capsys.readouterr().out)
    assert [row["table"] for row in view["damaged"]] == ["sessions", "writes", "models"]
    assert (view["models"][0]["name"], view["sessions"][0]["title"]) == ("", "")
    assert run(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "2 checkpoints and 3 KV pages" in shown
    assert "checksum does not match" in " ".join(shown.split())


def test_while_it_runs(cache: CheckpointCache, tmp_path: Path) -> None:
    code = "import sys; from clients.inspect_cache import main; sys.exit(main(sys.argv[1:]))"
    inspector = subprocess.run(
        [sys.executable, "-c", code, "--cache-dir", str(tmp_path), "--verify"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        timeout=60,
    )
    assert (inspector.returncode, inspector.stderr) == (0, "")
    assert "2 checkpoints and 3 KV pages" in inspector.stdout
    assert "All records are sound." in inspector.stdout
    cache.close()


@pytest.mark.parametrize("flag", [[], ["--json"], ["--verify"]])
def test_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str]) -> None:
    assert run(tmp_path / "nowhere", *flag) == 0
    shown = capsys.readouterr().out
    assert shown == ("null\n" if flag == ["--json"] else f"No checkpoints in {tmp_path}/nowhere.\n")


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run(file) == 1
    assert capsys.readouterr().err == f"qwend: {file} is not a folder.\n"
