"""A user asks the daemon why a request reused no more: over HTTP, with the real engine."""

from pathlib import Path
from typing import Any

from daemon_process import ROOT, DaemonProcess, StartDaemon

from daemon.engine.weights.gguf import open_gguf

MODEL = ROOT / "daemon" / "embedded" / "tiny-coder-Q4_K_M.gguf"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.title()} with care. " * 8,
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
    for name in ("look", "write")
]
RULES = "".join(f"Rule {number}: keep it short.\n" for number in range(40))
SYSTEM = {"role": "system", "content": f"{RULES}Today is Tuesday, 24 November.\nBe brief."}
HISTORY = [
    {"role": "user", "content": "What is in a.py?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "1", "type": "function",
             "function": {"name": "look", "arguments": '{"path": "a.py"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "".join(f"line {i}\n" for i in range(90))},
]  # fmt: skip


def explain(daemon: DaemonProcess, system: dict[str, Any], **body: Any) -> dict[str, Any]:
    answer = daemon.http.post(
        "/v1/chat/completions",
        json={
            "messages": [system, *HISTORY],
            "tools": TOOLS,
            "max_tokens": 2,
            "cache": {"explain": True},
            **body,
        },
    )
    plan: dict[str, Any] = answer.raise_for_status().json()["cache_plan"]
    used = answer.json()["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] == plan["restored"]["tokens"]
    assert used["prompt_tokens"] == plan["restored"]["tokens"] + plan["evaluated_tokens"]
    return plan


def on(day: str) -> dict[str, Any]:
    return {**SYSTEM, "content": SYSTEM["content"].replace("Tuesday, 24", day)}


def check_date(plan: dict[str, Any], before: str, after: str) -> None:
    difference = plan["difference"]
    assert (plan["cause"], difference["message"], difference["part"]) == (
        "system_changed",
        0,
        "system",
    )
    assert "Today is" in difference["shared"]
    assert before in difference["before"]
    assert after in difference["after"]
    assert plan["lost_tokens"] > 300 > 64 > plan["new_tokens"]
    assert plan["lost_s"] > 0


def test_the_date_changes_before_and_after_a_restart(start_daemon: StartDaemon) -> None:
    with start_daemon() as daemon:
        assert explain(daemon, SYSTEM)["cause"] == "never_seen"
        again = explain(daemon, SYSTEM)
        assert again["cause"] is None
        assert again["evaluated_tokens"] < 64 + 8
        check_date(explain(daemon, on("Wednesday, 25")), "Tuesday, 24", "Wednesday, 25")
        body = {"messages": [on("Friday, 27"), *HISTORY], "tools": TOOLS}
        foreseen = daemon.http.post("/v1/cache/plan", json=body).json()
        check_date(foreseen, "day, 2", "Friday, 27")
        assert daemon.stop() == 0
    with start_daemon() as daemon:
        check_date(explain(daemon, on("Friday, 27")), "day, 2", "Friday, 27")


def test_a_shared_beginning_that_has_no_checkpoint(start_daemon: StartDaemon) -> None:
    """Without a store nothing can be reused, and that is what is said."""
    with start_daemon(cache_dir=None) as daemon:
        explain(daemon, SYSTEM)
        plan = explain(daemon, SYSTEM)
        assert (plan["cause"], plan["restored"]["tokens"]) == ("no_checkpoint", 0)


def test_another_model_had_evaluated_it(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Another template makes another model of the same weights."""
    template = str(open_gguf(MODEL).metadata["tokenizer.chat_template"])
    other = tmp_path / "other.jinja"
    other.write_text(template + "{# the same, but not the same #}")
    with start_daemon() as daemon:
        explain(daemon, SYSTEM)
        assert daemon.stop() == 0
    with start_daemon("--chat-template-file", other) as daemon:
        plan = explain(daemon, SYSTEM)
        assert (plan["cause"], plan["restored"]["tokens"]) == ("other_model", 0)
        assert plan["nearest"]["model"]
