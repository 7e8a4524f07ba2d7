"""Loading tells how far it is, where somebody can see it and when it takes a while."""

import io
import logging

import pytest
from rich.console import Console

from daemon.load_progress import LoadProgress

GIGABYTE = 10**9


def test_a_small_model_loads_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    screen = io.StringIO()
    with LoadProgress("tiny.gguf", 1000, Console(file=screen, force_terminal=True)) as progress:
        progress.advance(1000)
    assert (screen.getvalue(), caplog.text) == ("", "")


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with LoadProgress("big.gguf", 16 * GIGABYTE, console) as progress:
        progress.advance(8 * GIGABYTE)
    assert "loading big.gguf" in screen.getvalue()


def test_elsewhere_the_log_gets_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = iter([0.0, 1.0, 6.0, 6.0, 7.0, 8.0])
    caplog.set_level(logging.INFO)
    screen = io.StringIO()
    console = Console(file=screen)
    with LoadProgress("big.gguf", 16 * GIGABYTE, console, lambda: next(now)) as progress:
        progress.advance(4 * GIGABYTE)
        progress.advance(4 * GIGABYTE)
        progress.advance(8 * GIGABYTE)
    assert screen.getvalue() == ""
    assert caplog.messages == [
        "loading big.gguf: 50 % of 16.0 GB",
        "loaded big.gguf: 16.0 GB in 8.0 s (2.0 GB/s)",
    ]


def test_a_failure_is_not_called_loaded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO())
    with pytest.raises(ZeroDivisionError), LoadProgress("big.gguf", 2 * GIGABYTE, console):
        raise ZeroDivisionError
    assert caplog.text == ""
