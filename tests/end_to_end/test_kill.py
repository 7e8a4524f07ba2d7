"""kill -9 in the middle of writes, again and again: a sound store, and the right answers.

The two hundred kills are twenty-five tests, which several processes share:
`pytest tests/end_to_end/test_kill.py -m slow -n auto`. On a card: `-m "slow and gpu"`, and for
another model than the embedded one `--serve "--model FILE.gguf --cache-size 20G"`.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon_process import DaemonProcess, StartDaemon
from qwend_clients.inspect_cache import StoreView, read_store

FLAGS = ("--strict", "--checkpoint-interval", "64", "--ctx", "8192", "--cache-ram", "256M")
"""Many checkpoints; and no more memory than lets many daemons run side by side."""

ROOMS = ("64M", "4G")
"""So little room that old ones are evicted all the time; so much that none ever is."""

NUM_SHARDS = 25

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


def check_sound(store: Path) -> StoreView:
    """Every record of the store is whole."""
    view = read_store(store, verify=True)
    assert view is not None
    assert view.damaged == ()
    return view


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def flags(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """How the daemon is served, but for its store."""
    return ("--device", request.param, *FLAGS, *request.config.getoption("--serve").split())


def kill_again_and_again(
    start_daemon: StartDaemon, store: Path, flags: tuple[str, ...], seed: int, num_kills: int
) -> None:
    rng = random.Random(seed)
    room = ROOMS[seed % len(ROOMS)]
    flags = ("--cache-size", room, *flags)
    with start_daemon(*flags, cache_dir=None) as daemon:
        cold, _ = answers(daemon)
    num_checkpoints = 0
    for _ in range(num_kills):
        with start_daemon(*flags) as daemon, load(daemon, rng) as answered:
            assert answered.wait(60)
            daemon.wait_until(lambda stats: stats["store"]["num_written"] > 0)
            threading.Event().wait(rng.uniform(0.0, 0.8))
            daemon.kill()
        num_before, num_checkpoints = num_checkpoints, check_sound(store).num_checkpoints
        assert num_checkpoints > 0
        if room == ROOMS[1]:
            assert num_checkpoints >= num_before, "what was committed has gone"
    with start_daemon(*flags) as daemon:
        resumed, num_reused = answers(daemon)
        assert resumed == cold
        assert num_reused > 0
        assert daemon.stats()["store"]["num_damaged"] == 0
        assert daemon.stop() == 0
    check_sound(store)


def test_kills_under_load_lose_nothing_that_was_written(
    start_daemon: StartDaemon, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    kill_again_and_again(start_daemon, tmp_path / "store", flags, seed=11, num_kills=4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_two_hundred_kills(
    start_daemon: StartDaemon, tmp_path: Path, flags: tuple[str, ...], shard: int
) -> None:
    num_kills = 200 // NUM_SHARDS
    kill_again_and_again(start_daemon, tmp_path / "store", flags, shard, num_kills)
