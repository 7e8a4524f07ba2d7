"""Daemons for the tests: one that serves a whole file's tests, and as many more as a test asks."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, StartDaemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(folder / "store", folder / "log") as process:
        yield process


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts `qwend serve` with a store in the test's folder, or where `cache_dir` says."""
    with ExitStack() as stack:

        def start(*flags: str | Path, cache_dir: Path | None = tmp_path / "store") -> DaemonProcess:
            return stack.enter_context(DaemonProcess(cache_dir, tmp_path / "log", *flags))

        yield start
