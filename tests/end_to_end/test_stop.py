"""`kill PID` and Ctrl-C, while idle work runs and checkpoints wait for the disk."""

import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
from daemon_process import ENVIRONMENT, ROOT, StartDaemon, qwend

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


SLOW_DISK = """
    import sys
    import time
    from daemon.cache.store import Store
    from daemon.cli import main

    write = Store.write

    def slow(self, batch):
        if batch.put_state is not None:
            time.sleep(120)
        write(self, batch)

    Store.write = slow
    sys.exit(main(sys.argv[1:]))
"""


def test_a_second_interrupt_waits_for_no_write(tmp_path: Path) -> None:
    store = tmp_path / "store"
    flags = ("--device", "cpu", "--port", "0", "--stop-grace", "100", "--cache-dir", str(store))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_DISK), "serve", *flags],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    found = next(filter(None, (re.search(r" at (http\S+)/v1 ", line) for line in process.stdout)))
    httpx.post(f"{found[1]}/v1/chat/completions", json=body(TEXT), timeout=60).raise_for_status()
    process.send_signal(signal.SIGINT)
    next(line for line in process.stderr if "stopping: up to" in line)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert qwend("inspect", "--verify", "--cache-dir", store).returncode == 0
