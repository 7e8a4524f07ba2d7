"""What a next question will begin with is evaluated before it comes, and gives way to who waits."""

import json
import time
from typing import Any

from daemon_process import DaemonProcess, StartDaemon

LINES = [f"def step_{number}(queue):\n    return queue.get({number})\n" for number in range(90)]
TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
CALL = {"name": "read", "arguments": json.dumps({"path": "steps.py"})}
HISTORY = [
    {"role": "user", "content": "What is in steps.py?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I shall read the file before I say anything about it.",
        "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "".join(LINES)},
]
OTHER = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
MAX_NEW = 24
"""Tokens of the next question, with what the template writes around it."""


def ask(daemon: DaemonProcess, body: dict[str, Any]) -> dict[str, Any]:
    answer = daemon.http.post("/v1/chat/completions", json={"max_tokens": 200, **body})
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def loop() -> dict[str, Any]:
    return {"messages": HISTORY, "tools": [TOOL], "temperature": 0}


def next_question(answer: dict[str, Any]) -> dict[str, Any]:
    question = {"role": "user", "content": "And in words?"}
    message = answer["choices"][0]["message"]
    assert not message.get("tool_calls"), "the answer that this model gives is text"
    return {**loop(), "messages": [*HISTORY, message, question], "max_tokens": 1}


def wait_until_prepared(daemon: DaemonProcess, body: dict[str, Any]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        plan = daemon.http.post("/v1/cache/plan", json=body).raise_for_status().json()
        if plan["prompt_tokens"] - plan["restored"]["tokens"] <= MAX_NEW + 64:
            return
        time.sleep(0.05)
    raise TimeoutError(json.dumps(plan))


def check_that_only_the_question_is_evaluated(daemon: DaemonProcess, body: dict[str, Any]) -> None:
    usage = ask(daemon, body)["usage"]
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert num_cached > 1_300
    assert usage["prompt_tokens"] - num_cached <= MAX_NEW + 64


def test_a_new_question_costs_its_own_tokens_though_thinking_drops_out(
    start_daemon: StartDaemon,
) -> None:
    with start_daemon() as daemon:
        body = next_question(ask(daemon, loop()))
        wait_until_prepared(daemon, body)
        check_that_only_the_question_is_evaluated(daemon, body)


def test_whoever_asks_meanwhile_is_answered_first_and_nothing_is_lost(
    start_daemon: StartDaemon,
) -> None:
    with start_daemon("--parallel", "1") as daemon:
        alone = ask(daemon, OTHER)["choices"][0]["message"]["content"]
        body = next_question(ask(daemon, loop()))
        assert ask(daemon, OTHER)["choices"][0]["message"]["content"] == alone
        wait_until_prepared(daemon, body)
        check_that_only_the_question_is_evaluated(daemon, body)


def test_without_idle_work_nothing_is_prepared(start_daemon: StartDaemon) -> None:
    with start_daemon("--no-idle-work") as daemon:
        usage = ask(daemon, next_question(ask(daemon, loop())))["usage"]
        assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] > 1_000
