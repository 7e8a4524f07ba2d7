"""The real daemon as a process of its own, as a user starts it, and ways to talk to it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
from openai import OpenAI

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""One thread each: several daemons and the tests share few cores, and threads that wait for one
another then take ten times as long."""


def qwend(
    *arguments: str | Path, stdin: str = "", timeout_s: float = START_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def command(*arguments: str | Path) -> list[str]:
    """`qwend …` of the interpreter that runs the tests."""
    return [sys.executable, "-m", "daemon", *map(str, arguments)]


class DaemonProcess:
    """`qwend serve` on a free port, from its URL line to its end. A context manager.

    Args:
        cache_dir: its store; None serves without one.
        log: where its standard error goes.
    """

    def __init__(self, cache_dir: Path | None, log: Path, *flags: str | Path) -> None:
        store = ("--cache-dir", cache_dir) if cache_dir else ("--no-cache",)
        store += ("--write-delay", "0")
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command("serve", "--port", "0", *store, "--device", "cpu", *flags),
                cwd=ROOT,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.url = self._read_url()
        except BaseException:
            self.kill()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=END_TIMEOUT_S)
        self.openai = OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=END_TIMEOUT_S * 2
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self.http.close()
        self.openai.close()

    def stop(self) -> int:
        """End it as `kill PID` does; the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        status = self._process.wait(END_TIMEOUT_S)
        self._close_output()
        return status

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.kill()
        self._process.wait(END_TIMEOUT_S)
        self._close_output()

    def log(self) -> str:
        """Its standard error so far."""
        return self._log.read_text()

    def stats(self) -> dict[str, Any]:
        """The body of /v1/cache/stats."""
        answer: dict[str, Any] = self.http.get("/v1/cache/stats").raise_for_status().json()
        return answer

    def wait_until(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 30) -> None:
        """Wait for the statistics to say so."""
        end = time.monotonic() + timeout_s
        while not holds(stats := self.stats()):
            if time.monotonic() > end:
                raise TimeoutError(json.dumps(stats))
            time.sleep(0.02)

    def wait_until_written(self) -> None:
        """Wait until no request is open and no checkpoint waits to be written."""
        self.wait_until(
            lambda stats: (
                not any((stats["running"], stats["waiting"], stats["store"]["queue_bytes"]))
            )
        )

    def _read_url(self) -> str:
        """The URL of the line that says it serves; gives up when it ends or takes too long."""
        assert self._process.stdout is not None
        timer = threading.Timer(START_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                if found := re.search(r" at (http://\S+)/v1 ", line):
                    return found[1]
        finally:
            timer.cancel()
        raise RuntimeError(f"no URL; standard error says:\n{self.log()}")

    def _close_output(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()


StartDaemon = Callable[..., DaemonProcess]
"""Starts `qwend serve` with these flags; see the fixture `start_daemon`."""
