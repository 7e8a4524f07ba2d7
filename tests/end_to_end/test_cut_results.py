"""Where a client cut a tool's result is known after a restart: the next conversation is ready."""

from typing import Any

from daemon_process import DaemonProcess, StartDaemon

from daemon.checkpoint import PAGE_TOKENS

CUT = 3700
"""Characters that the client leaves of an old result: beyond where heads have checkpoints."""


def conversation(word: str, num_left: int | None = None) -> list[dict[str, Any]]:
    """One call of a tool and what it gave; later cut, and said so."""
    lines = "".join(f"{number} {word} here\n" for number in range(450))
    result = lines if num_left is None else f"{lines[:num_left]}\n[cut]"
    call = {"name": "look", "arguments": f'{{"path": "{word}"}}'}
    return [
        {"role": "user", "content": f"What is in {word}?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "1", "content": result},
    ]


def ask(daemon: DaemonProcess, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 1, "cache": {"explain": True}}
    answer = daemon.http.post("/v1/chat/completions", json=body)
    plan: dict[str, Any] = answer.raise_for_status().json()["cache_plan"]
    return plan


def cut_later(daemon: DaemonProcess, word: str) -> dict[str, Any]:
    """What is reused by the request that shows the result cut."""
    ask(daemon, conversation(word))
    return ask(daemon, conversation(word, CUT))


def num_lost(plan: dict[str, Any]) -> int:
    """Tokens before the cut that were evaluated again."""
    assert plan["difference"]["cut"] == CUT
    return int(plan["nearest"]["common_tokens"] - plan["restored"]["tokens"])


def test_a_cut_learned_before_a_restart_is_ready_for_the_first(start_daemon: StartDaemon) -> None:
    with start_daemon() as daemon:
        first = cut_later(daemon, "one")
        assert first["restored"]["reason"] != "tool"
        assert num_lost(first) >= PAGE_TOKENS
        assert daemon.stop() == 0
    with start_daemon() as daemon:
        second = cut_later(daemon, "two")
        assert second["restored"]["reason"] == "tool"
        assert num_lost(second) < PAGE_TOKENS
        assert daemon.stop() == 0
