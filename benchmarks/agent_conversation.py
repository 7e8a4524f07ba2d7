"""A coding agent's session in our own words: system prompt, 14 tools, tool steps, and what clients
do to their history in between.

Owns the texts and their sizes, which are those of a real agent's requests. The same every time: no
clock, no randomness. What answers is scripted, so that only the evaluation of prompts is compared.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]

DATE, NEXT_DATE = "Tuesday, 24 November 2026", "Wednesday, 25 November 2026"

VERBS = ("read", "parse", "merge", "store", "check", "route", "cache", "split", "close", "count")
NOUNS = ("queue", "record", "socket", "index", "buffer", "header", "ledger", "cursor", "branch",
         "packet", "window")  # fmt: skip
TOPICS = ("Working with files", "Running commands", "Writing code", "Tests", "Version control",
          "Talking to the user", "Planning", "Errors", "Security", "Finishing")  # fmt: skip
TOOL_NAMES = ("read_file", "write_file", "edit_file", "list_folder", "find_files", "search_text",
              "run_command", "read_output", "stop_command", "fetch_page", "plan_tasks",
              "ask_user", "start_agent", "save_note")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request of the session. `is_turn`: the user was away before it, and the server idle."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    is_turn: bool = False
    after_restart: bool = False


def session() -> Iterator[Request]:
    """The session of `benchmarks/README.md`, request by request."""
    tools = tuple(_tool(name, number) for number, name in enumerate(TOOL_NAMES))
    system = {"role": "system", "content": _system_prompt(DATE)}
    history: list[Message] = [system, _user("Find out why records are lost when a queue closes.")]
    yield Request("turn 1, cold", tuple(history), tools)
    for step, lines in enumerate((115, 155, 190, 215), 1):
        history += _tool_step(step, lines)
        yield Request(f"tool step {step}", tuple(history), tools)
    history.append(_answer("The queue drops what it holds when close() comes before flush()."))
    history.append(_user("Good. Mend it, and add a test that fails without the change."))
    yield Request("second user message", tuple(history), tools, is_turn=True)
    for step, lines in ((5, 155), (6, 150)):
        history += _tool_step(step, lines)
        yield Request(f"tool step {step}", tuple(history), tools)
    title = ({"role": "system", "content": "Name the conversation in five words."}, history[1])
    yield Request("side request: a title", title, ())
    history += _tool_step(7, 66)
    yield Request("tool step 7", tuple(history), tools)
    yield Request("an old tool result truncated", tuple(_truncated(history)), tools)
    changed = [{"role": "system", "content": _system_prompt(NEXT_DATE)}, *history[1:]]
    yield Request("the date in the system prompt changed", tuple(changed), tools)
    again = Request("the same prompt again", tuple(changed), tools)
    yield again
    yield replace(again, name="the same prompt after a restart", after_restart=True)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text, "reasoning_content": _thought(len(text), 6)}


def _tool_step(step: int, lines: int) -> list[Message]:
    """The assistant's thinking and call, and a file as its result."""
    path = f"src/{_pick(NOUNS, step)}/{_pick(VERBS, step)}.py"
    function = {"name": "read_file", "arguments": json.dumps({"path": path, "first_line": 1})}
    call = {"id": f"call_{step}", "type": "function", "function": function}
    said = {
        "role": "assistant",
        "content": f"I read {path}.",
        "reasoning_content": _thought(step, 5),
        "tool_calls": [call],
    }
    result = {"role": "tool", "tool_call_id": call["id"], "content": _source(step, lines)}
    return [said, result]


def _truncated(history: list[Message]) -> Iterator[Message]:
    """The first tool result cut in its middle, as clients do when their history grows long."""
    place = next(i for i, message in enumerate(history) if message["role"] == "tool")
    for number, message in enumerate(history):
        text = message["content"]
        if number == place:
            yield {**message, "content": f"{text[:900]}\n[… {len(text) - 1800} characters cut …]\n"
                                         f"{text[-900:]}"}  # fmt: skip
        else:
            yield message


def _pick(words: tuple[str, ...], number: int) -> str:
    return words[number * 7 % len(words)]


def _thought(seed: int, sentences: int) -> str:
    return " ".join(
        f"The {_pick(NOUNS, seed + i)} may {_pick(VERBS, seed + 3 * i)} the "
        f"{_pick(NOUNS, 2 * seed + i)} before the {_pick(NOUNS, i)} is there."
        for i in range(sentences)
    )


def _source(seed: int, lines: int) -> str:
    blocks = (
        f"    def {_pick(VERBS, seed + i)}_{_pick(NOUNS, i)}_{i}(self, limit: int) -> int:\n"
        f"        left = self.{_pick(NOUNS, seed + i)}.{_pick(VERBS, i)}(limit - {i % 9})\n"
        f"        return max(left, {seed * i % 64})"
        for i in range(lines // 3)
    )
    return f"class {_pick(NOUNS, seed).title()}:\n" + "\n\n".join(blocks) + "\n"


def _system_prompt(date: str) -> str:
    """Ten chapters of rules, then what changes from day to day."""
    chapters = (
        f"# {topic}\n\n" + "\n".join(f"- {_rule(number, i)}" for i in range(15))
        for number, topic in enumerate(TOPICS)
    )
    surroundings = f"# Surroundings\n\nFolder: /home/dev/queue\nSystem: Linux\nToday: {date}\n"
    return "You are an agent that writes and mends code.\n\n" + "\n\n".join(
        [*chapters, surroundings]
    )


def _rule(chapter: int, number: int) -> str:
    seed = 11 * chapter + number
    return (
        f"When you {_pick(VERBS, seed)} a {_pick(NOUNS, seed)}, first {_pick(VERBS, seed + 1)} "
        f"its {_pick(NOUNS, seed + 2)}; never {_pick(VERBS, seed + 4)} two of them at once, and "
        f"say in one line what you did."
    )


def _tool(name: str, number: int) -> dict[str, Any]:
    noun = _pick(NOUNS, number)
    properties = {
        key: {"type": kind, "description": f"The {text} {name} works with. {_rule(number, i)}"}
        for i, (key, kind, text) in enumerate(
            (
                ("path", "string", "file or folder that"),
                ("first_line", "integer", "line at which"),
                (f"{noun}_limit", "integer", "greatest number that"),
                ("timeout_s", "number", "time in seconds that"),
            )
        )
    }
    usage = " ".join(_rule(number, i) for i in range(4, 11))
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Use it to {name.replace('_', ' ')}. {usage}",
            "parameters": {"type": "object", "properties": properties, "required": ["path"]},
        },
    }
