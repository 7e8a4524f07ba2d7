"""kill -9 in the middle of writes, again and again: a sound store, and the right answers."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon_process import DaemonProcess, StartDaemon, qwend

FLAGS = ("--strict", "--checkpoint-interval", "64", "--cache-size", "64M")
"""Many checkpoints, and so little room that old ones are evicted all the time."""

SYSTEM = "You are a helpful coding assistant that works in a repository. " * 8
CODE = [f"def step_{number}(queue):\n    return queue.get({number})\n" for number in range(60)]


def prompt(first: int, num_lines: int) -> list[dict[str, Any]]:
    text = "Explain this.\n" + "".join(CODE[first : first + num_lines])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


QUESTIONS = [prompt(0, 2), prompt(0, 20), prompt(5, 12), prompt(20, 30)]


def body(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": messages, "temperature": 0, "max_tokens": 12, "logprobs": True}


def answers(daemon: DaemonProcess) -> tuple[list[Any], int]:
    """All tokens with their log-probabilities for each question; the tokens reused."""
    replies = [
        daemon.http.post("/v1/chat/completions", json=body(question)).raise_for_status().json()
        for question in QUESTIONS
    ]
    reused = sum(reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies)
    return [reply["choices"][0]["logprobs"]["content"] for reply in replies], reused


@contextmanager
def load(daemon: DaemonProcess, rng: random.Random) -> Iterator[threading.Event]:
    """Three clients that ask without pause until the daemon is gone; set at the first answer."""
    answered, over = threading.Event(), threading.Event()

    def client(numbers: random.Random) -> None:
        with httpx.Client(base_url=daemon.url, timeout=60) as http:
            while not over.is_set():
                messages = prompt(numbers.randrange(30), numbers.randrange(2, 30))
                try:
                    http.post("/v1/chat/completions", json=body(messages))
                except httpx.TransportError:
                    return
                answered.set()

    clients = [
        threading.Thread(target=client, args=(random.Random(rng.random()),)) for _ in range(3)
    ]
    for thread in clients:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in clients:
            thread.join(60)


def check_sound(store: Path) -> dict[str, Any]:
    """Every record of the store is whole."""
    done = qwend("inspect", "--verify", "--json", "--cache-dir", store)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["damaged"] == []
    return document


@pytest.mark.parametrize(
    "num_kills", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_kills_under_load_lose_nothing_that_was_written(
    start_daemon: StartDaemon, tmp_path: Path, num_kills: int
) -> None:
    rng = random.Random(11)
    with start_daemon("--strict", cache_dir=None) as daemon:
        cold, _ = answers(daemon)
    num_checkpoints = 0
    for _ in range(num_kills):
        with start_daemon(*FLAGS) as daemon, load(daemon, rng) as answered:
            assert answered.wait(60)
            daemon.wait_until(lambda stats: stats["store"]["num_written"] > 0)
            threading.Event().wait(rng.uniform(0.0, 0.8))
            daemon.kill()
        num_checkpoints = check_sound(tmp_path / "store")["num_checkpoints"]
    assert num_checkpoints > 0
    with start_daemon(*FLAGS) as daemon:
        resumed, num_reused = answers(daemon)
        assert resumed == cold
        assert num_reused > 0
        assert daemon.stats()["store"]["num_damaged"] == 0
        assert daemon.stop() == 0
    check_sound(tmp_path / "store")
