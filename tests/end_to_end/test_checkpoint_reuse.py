"""What a request evaluates when an earlier one shared its beginning: in one run, after a clean
stop, and after kill -9."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, StartDaemon, qwend

SYSTEM = {"role": "system", "content": "You are a helpful coding assistant."}
LINES = [f"def step_{number}(queue):\n    return queue.get({number})\n" for number in range(200)]
NUM_LINES = 94
"""Make a prompt of about 1,500 tokens."""

Messages = list[dict[str, Any]]
Answer = tuple[str, int, int]
"""The text, the prompt's tokens, and how many of them were not evaluated again."""


def ask(daemon: DaemonProcess, messages: Messages, max_tokens: int = 24) -> Answer:
    completion = daemon.openai.chat.completions.create(
        model="tiny-coder",
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        extra_body={"enable_thinking": False},
    )
    usage = completion.usage
    text = completion.choices[0].message.content or ""
    return text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def first_prompt() -> Messages:
    return [SYSTEM, {"role": "user", "content": "".join(LINES[:NUM_LINES])}]


def next_turn(answer: str) -> Messages:
    question = f"Repeat exactly: {''.join(LINES[100:103])}"
    return [
        *first_prompt(),
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]


def longer_message() -> Messages:
    return [SYSTEM, {"role": "user", "content": "".join(LINES[: NUM_LINES + 5])}]


def check_reuse(daemon: DaemonProcess, messages: Messages, num_before: int) -> None:
    """At most 100 new tokens, and at most a page more than those is evaluated."""
    _, num_prompt, num_cached = ask(daemon, messages)
    assert 1_400 <= num_before < num_prompt <= num_before + 100
    assert num_prompt - num_cached <= 164
    assert num_cached % 64 == 0


def test_requests_in_flight_evaluate_together_what_they_begin_with(
    start_daemon: StartDaemon,
) -> None:
    """A main request and three sub-agents, say: the instructions are evaluated once."""
    system = {"role": "system", "content": "".join(LINES[:NUM_LINES])}
    asked = [[system, {"role": "user", "content": f"Explain step_{i}."}] for i in range(4)]
    with start_daemon("--no-idle-work") as daemon:
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda messages: ask(daemon, messages), asked))
        evaluated = [num_prompt - num_cached for _, num_prompt, num_cached in answers]
        assert 1_400 <= max(evaluated)
        assert sum(evaluated) - max(evaluated) <= 3 * (64 + 30)
        metrics = daemon.http.get("/metrics").text
        assert "qwend_requests_followed_total 3.0" in metrics
        plans = daemon.http.get("/v1/cache/requests").json()["data"]
        waited = [plan["restored"].get("followed_s") is not None for plan in plans]
        assert sorted(waited) == [False, True, True, True]
    with start_daemon(cache_dir=None) as daemon:
        assert [ask(daemon, messages)[0] for messages in asked] == [text for text, *_ in answers]


def end_cleanly(daemon: DaemonProcess) -> None:
    assert daemon.stop() == 0


def end_by_kill(daemon: DaemonProcess) -> None:
    daemon.wait_until_written()
    daemon.kill()


def test_a_prompt_that_goes_on_evaluates_only_what_is_new(start_daemon: StartDaemon) -> None:
    with start_daemon() as daemon:
        answer, num_prompt, num_cached = ask(daemon, first_prompt())
        assert num_cached == 0
        check_reuse(daemon, next_turn(answer), num_prompt)
        check_reuse(daemon, longer_message(), num_prompt)


@pytest.mark.parametrize("end", [end_cleanly, end_by_kill])
def test_a_restart_forgets_nothing(
    start_daemon: StartDaemon, end: Callable[[DaemonProcess], None]
) -> None:
    with start_daemon() as daemon:
        answer, num_prompt, _ = ask(daemon, first_prompt())
        end(daemon)
    with start_daemon() as daemon:
        check_reuse(daemon, next_turn(answer), num_prompt)
        check_reuse(daemon, longer_message(), num_prompt)


def test_the_same_prompt_again_evaluates_less_than_a_page_and_its_end(
    start_daemon: StartDaemon,
) -> None:
    with start_daemon() as daemon:
        first, num_prompt, _ = ask(daemon, first_prompt())
        again, _, num_cached = ask(daemon, first_prompt())
        assert again == first
        assert num_prompt - num_cached < 64 + 8


def test_cached_tokens_are_a_position_that_is_in_the_store(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Counted by another path than usage: `qwend inspect` reads the store itself."""
    with start_daemon() as daemon:
        ask(daemon, first_prompt())
        daemon.wait_until_written()
        stored = positions(tmp_path / "store")
        _, num_prompt, num_cached = ask(daemon, first_prompt())
        assert num_cached == max(position for position in stored if position < num_prompt)


def test_without_a_cache_everything_is_evaluated(start_daemon: StartDaemon) -> None:
    with start_daemon(cache_dir=None) as daemon:
        first = ask(daemon, first_prompt())
        assert ask(daemon, first_prompt()) == first
        assert first[2] == 0


def positions(store: Path) -> set[int]:
    """The positions of all checkpoints of a store."""
    document = json.loads(qwend("inspect", "--json", "--cache-dir", store).stdout)
    return {
        checkpoint["position"]
        for session in document["sessions"]
        for checkpoint in session["checkpoints"]
    }
