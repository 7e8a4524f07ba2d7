"""The official client runs an agent's loop: three questions, tools called for real, tiny-coder."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, StartDaemon
from openai.types.chat import ChatCompletionChunk
from workspace_tools import TOOLS, Workspace

QUESTIONS = (
    "Where is parse defined?",
    "Rename parse to parse_falcon in src/parser.py.",
    "Run the tests.",
)
EXPECTED_CALLS = [
    ("grep", {"pattern": "def parse"}),
    ("read_file", {"path": "src/parser.py"}),
    (
        "edit_file",
        {"path": "src/parser.py", "old": "def parse(", "new": "def parse_falcon("},
    ),
    ("run_shell", {"command": "python3 -m pytest -q"}),
]
MAX_STEPS = 5

Reply = tuple[dict[str, Any], str, Any]
"""The assistant's message as it goes back, the finish reason, the usage."""


def ask(daemon: DaemonProcess, messages: list[dict[str, Any]]) -> Reply:
    completion = daemon.openai.chat.completions.create(
        model="tiny-coder", messages=messages, tools=TOOLS, temperature=0, max_tokens=200
    )
    [choice] = completion.choices
    return choice.message.model_dump(exclude_none=True), choice.finish_reason, completion.usage


def ask_streaming(daemon: DaemonProcess, messages: list[dict[str, Any]]) -> Reply:
    stream = daemon.openai.chat.completions.create(
        model="tiny-coder",
        messages=messages,
        tools=TOOLS,
        temperature=0,
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    with stream as chunks:
        return assemble(chunks)


def assemble(chunks: Iterable[ChatCompletionChunk]) -> Reply:
    """Put a stream's deltas together, as agents do."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
    calls: dict[int, dict[str, Any]] = {}
    finish, usage = "", None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, {"id": part.id, "type": "function"})
                function = call.setdefault("function", {"name": "", "arguments": ""})
                function["name"] += part.function.name or ""
                function["arguments"] += part.function.arguments or ""
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message, finish, usage


@pytest.mark.parametrize("ask_once", [ask, ask_streaming])
def test_three_questions_with_tools(
    daemon: DaemonProcess, tmp_path: Path, ask_once: Callable[..., Reply]
) -> None:
    workspace = Workspace(tmp_path)
    messages = [{"role": "system", "content": "You are a coding agent."}]
    before = daemon.stats()["total"]
    answers, usages = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answers.append(run_turn(daemon, workspace, messages, usages, ask_once))

    assert workspace.calls == EXPECTED_CALLS
    assert "def parse_falcon(" in (tmp_path / "src/parser.py").read_text()
    assert answers == [
        "`parse` is defined in src/parser.py, line 4.",
        "Renamed `parse` to `parse_falcon` in src/parser.py.",
        "All 2 tests pass.",
    ]
    check_usage(daemon, usages, before)


def run_turn(
    daemon: DaemonProcess,
    workspace: Workspace,
    messages: list[dict[str, Any]],
    usages: list[Any],
    ask_once: Callable[..., Reply],
) -> str:
    """Ask until the model answers without a call; its answer."""
    for _ in range(MAX_STEPS):
        message, finish, usage = ask_once(daemon, messages)
        messages.append(message)
        usages.append(usage)
        assert message["reasoning_content"]
        if "tool_calls" not in message:
            assert finish == "stop"
            return str(message["content"])
        assert finish == "tool_calls"
        for call in message["tool_calls"]:
            function = call["function"]
            answer = workspace.call(function["name"], json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
    raise AssertionError(f"still calling tools after {MAX_STEPS} steps")


def check_usage(daemon: DaemonProcess, usages: list[Any], before: dict[str, Any]) -> None:
    """Usage adds up, every step but the first resumes, and the daemon's own sums agree."""
    daemon.wait_until(lambda stats: not stats["running"])
    after = daemon.stats()["total"]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    prompts = [usage.prompt_tokens for usage in usages]
    assert all(
        usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages
    )
    assert all(
        number % 64 == 0 and number < prompt for number, prompt in zip(cached, prompts, strict=True)
    )
    assert all(cached[1:])
    assert after["tokens_reused"] - before["tokens_reused"] == sum(cached)
    assert after["tokens_evaluated"] - before["tokens_evaluated"] == sum(prompts) - sum(cached)


def write_a_file(daemon: DaemonProcess) -> tuple[Any, Any]:
    """A call as long as a page or more, and its answer; the usage of both steps."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a coding agent."},
        {
            "role": "user",
            "content": "Create src/queue.py with `get`: Return the next item of the queue.",
        },
    ]
    message, _, first = ask(daemon, messages)
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "write_file"
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "ok"}
    _, _, second = ask(daemon, [*messages, message, answer])
    return first, second


def test_a_call_that_comes_back_is_the_tokens_that_were_sampled(daemon: DaemonProcess) -> None:
    """Only its last page and the tool's answer are evaluated."""
    first, second = write_a_file(daemon)
    sampled_until = first.prompt_tokens + first.completion_tokens
    assert second.prompt_tokens_details.cached_tokens == sampled_until // 64 * 64
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens


def test_strict_evaluates_sampled_tokens_again(start_daemon: StartDaemon) -> None:
    """The end of the reply is a state born by decoding; the prompt's checkpoints are not."""
    with start_daemon("--strict", "--no-idle-work") as daemon:
        first, second = write_a_file(daemon)
    assert 0 < second.prompt_tokens_details.cached_tokens <= first.prompt_tokens
