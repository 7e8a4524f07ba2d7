"""A device that fails for good in the middle: one clear line, a sound store, and work kept."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx
from daemon_process import ENVIRONMENT, ROOT, StartDaemon

FAILING_DAEMON = """
    import sys
    from daemon.cli import main
    from daemon.engine.backends.numpy_backend import NumpyBackend
    from daemon.errors import DeviceLost

    evaluate = NumpyBackend.evaluate

    def failing(self, batch, forward):
        if any(span.end > 600 for span in batch.spans):
            raise DeviceLost("Could not finish work on the GPU: an illegal memory access.")
        return evaluate(self, batch, forward)

    NumpyBackend.evaluate = failing
    sys.exit(main(sys.argv[1:]))
"""


def body(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 4}


def test_a_lost_device_ends_the_daemon_and_keeps_the_store(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    flags = ("--device", "cpu", "--port", "0", "--cache-dir", str(tmp_path / "store"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FAILING_DAEMON), "serve", *flags],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    found = next(filter(None, (re.search(r" at (http\S+)/v1 ", line) for line in process.stdout)))
    short = "Explain: " + "def f(x): return x\n" * 20
    with httpx.Client(base_url=found[1], timeout=60) as http:
        assert http.post("/v1/chat/completions", json=body(short)).status_code == 200
        failed = http.post("/v1/chat/completions", json=body("word " * 2000))
    _, errors = process.communicate(timeout=60)
    assert failed.status_code >= 500
    assert "illegal memory access" in failed.json()["error"]["message"]
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("qwend: error: the engine stopped: Could not finish")
    assert "Traceback" not in errors
    with start_daemon() as daemon:
        answer = daemon.http.post("/v1/chat/completions", json=body(short)).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
