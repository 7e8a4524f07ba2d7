"""`kill PID` and Ctrl-C, while idle work runs and checkpoints wait for the disk."""

import signal
from pathlib import Path

from daemon_process import StartDaemon, qwend

TEXT = "".join(f"def step_{n}(queue):\n    return queue.get({n})\n" for n in range(50))


def body(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 70}


def test_idle_work_is_dropped_and_what_waits_is_written(start_daemon: StartDaemon) -> None:
    flags = ("--write-delay", "600", "--audit-share", "1")
    with start_daemon(*flags) as daemon:
        for _ in range(2):
            daemon.http.post("/v1/chat/completions", json=body(TEXT)).raise_for_status()
        assert daemon.stats()["store"]["queue_bytes"] > 0
        assert daemon.stop() == 0
        assert "stopping: up to" in daemon.log()
    with start_daemon() as daemon:
        answer = daemon.http.post("/v1/chat/completions", json=body(TEXT)).raise_for_status()
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 500


def test_without_a_grace_the_store_stays_sound_and_the_loss_is_told(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    with start_daemon("--write-delay", "600", "--stop-grace", "0") as daemon:
        daemon.http.post("/v1/chat/completions", json=body(TEXT)).raise_for_status()
        daemon.signal(signal.SIGINT)
        assert daemon.wait() == 0
        assert "were not written in time" in daemon.log()
    done = qwend("inspect", "--verify", "--json", "--cache-dir", tmp_path / "store")
    assert done.returncode == 0, done.stdout + done.stderr
