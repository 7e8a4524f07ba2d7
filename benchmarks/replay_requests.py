"""Replays recorded requests of real agents against the application, with a scripted engine.

    PYTHONPATH=tests python -m benchmarks.replay_requests FOLDER

FOLDER holds one `.jsonl` file a session, one request a line: `method`, `path`, `query`, `headers`,
`body`, and `response` with the `reasoning`, `text` and `calls` that the model is to answer. Every
request must be accepted, and its answer must give back exactly these, as the types that its
dialect has for them. It prints, a session, how much of each prompt an earlier one of the session
begins with, which is what a store can save at most: as this server shows the conversation, and as
one would that moves later system messages into the first and keeps billing headers.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fakes import RememberedReplies
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from scripted_app import scripted_engine, scripted_service, spell_reply, text_side

from daemon.api.app import create_app
from daemon.engine.requests import GenerationRequest
from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.normalisers import BILLING
from daemon.text.prompt import Prompt, PromptBuilder

CONTEXT = 1 << 20


class Answered(Struct, frozen=True):
    """What an answer says, whatever its dialect; calls as (name, arguments)."""

    reasoning: str
    text: str
    calls: list[tuple[str, Any]]


class Outcome(Struct, frozen=True):
    """What became of one request: what is wrong with it, its prompt, and the plainer one."""

    fault: str
    tokens: Sequence[int]
    plain_tokens: Sequence[int]


class Session(Struct, frozen=True):
    """A file, replayed."""

    name: str
    outcomes: list[Outcome]

    def faults(self) -> list[str]:
        """What went wrong."""
        return [f"{self.name}: {outcome.fault}" for outcome in self.outcomes if outcome.fault]


class PlainPrompts(PromptBuilder):
    """Builds prompts as told, and beside each the one of a server without our rules."""

    header = ""
    plain: tuple[int, ...] = ()

    def build(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """See PromptBuilder.build."""
        system = [message.content for message in messages if message.role == "system"]
        others = [message for message in messages if message.role != "system"]
        first = Message(role="system", content=self.header + "\n\n".join(system))
        self.plain = super().build([first, *others] if system else others, tools, options).tokens
        return super().build(messages, tools, options)


def shared(prompts: Sequence[Sequence[int]]) -> float:
    """The share of all prompts' tokens that an earlier one begins with."""
    found = sum(
        max((_num_common(prompt, earlier) for earlier in prompts[:i]), default=0)
        for i, prompt in enumerate(prompts)
    )
    return found / max(1, sum(map(len, prompts)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay every session of a folder; 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    sessions = asyncio.run(_replay_all(sorted(options.folder.glob("*.jsonl"))))
    table = Table("session", "requests", "right", "prompt tokens", "begun before", "plainly")
    for session in sessions:
        ours = [outcome.tokens for outcome in session.outcomes if outcome.tokens]
        plain = [outcome.plain_tokens for outcome in session.outcomes if outcome.tokens]
        num, num_wrong = len(session.outcomes), len(session.faults())
        shares = (f"{shared(ours):.1%}", f"{shared(plain):.1%}")
        total = f"{sum(map(len, ours)):,}"
        table.add_row(session.name, str(num), str(num - num_wrong), total, *shares)
    console = Console()
    console.print(table)
    faults = [fault for session in sessions for fault in session.faults()]
    for fault in faults:
        console.print(fault, markup=False)
    return 1 if faults or not sessions else 0


async def _replay_all(files: Sequence[Path]) -> list[Session]:
    text = text_side()
    wanted: dict[str, Any] = {}

    def reply(request: GenerationRequest) -> str:
        prompt = text.tokenizer.decode(request.tokens[-16:])
        calls = [
            ToolCall("", call["name"], json.loads(call["arguments"]))
            for call in wanted.get("calls") or ()
        ]
        thinking_open = prompt.rfind("<think>") > prompt.rfind("</think>")
        return spell_reply(
            wanted.get("text") or "",
            calls,
            reasoning=wanted.get("reasoning"),
            thinking_open=thinking_open,
        )

    engine = scripted_engine(text, reply, context_length=CONTEXT)
    sessions = []
    try:
        for file in files:
            replies = RememberedReplies()
            service = scripted_service(text, engine, replies, None)
            prompts = PlainPrompts(text.tokenizer, text.template, replies)
            app = create_app(msgspec.structs.replace(service, prompts=prompts))
            transport = httpx.ASGITransport(app)
            outcomes = []
            async with httpx.AsyncClient(transport=transport, base_url="http://qwend") as client:
                for line in file.read_text().splitlines():
                    record = json.loads(line)
                    wanted.clear()
                    wanted.update(record.get("response") or {})
                    prompts.header = _billing_header(record["body"])
                    engine.requests.clear()
                    fault = await _replay(client, record)
                    tokens = engine.requests[-1].tokens if engine.requests else ()
                    outcomes.append(Outcome(fault, tokens, prompts.plain))
            sessions.append(Session(file.stem, outcomes))
    finally:
        engine.stop()
        text.constrainer.close()
    return sessions


def _billing_header(body: dict[str, Any] | None) -> str:
    """The system block that this server leaves out."""
    blocks = (body or {}).get("system")
    first = blocks[0]["text"] if isinstance(blocks, list) and blocks else ""
    return f"{first}\n\n" if BILLING.match(first) else ""


async def _replay(client: httpx.AsyncClient, record: dict[str, Any]) -> str:
    """What is wrong with the answer; "" when nothing is."""
    path = record["path"] + (f"?{record['query']}" if record.get("query") else "")
    skipped = ("content-length", "host", "transfer-encoding", "accept-encoding")
    headers = {k: v for k, v in record["headers"].items() if k.lower() not in skipped}
    content = json.dumps(record["body"]) if record["body"] is not None else None
    response = await client.request(record["method"], path, headers=headers, content=content)
    where = f"request {record['seq']} {record['method']} {path}"
    if response.status_code != 200:
        return f"{where}: {response.status_code} {response.text[:300]}"
    if record["method"] != "POST":
        return ""
    found = READERS[record["path"]](response)
    expected = record["response"] or {}
    calls = [(c["name"], json.loads(c["arguments"])) for c in expected.get("calls") or ()]
    wrong = [] if found.calls == calls else [f"calls {found.calls} for {calls}"]
    for part in ("text", "reasoning"):
        given, wanted = getattr(found, part), expected.get(part) or ""
        if given != wanted and not (part == "reasoning" and not given):
            wrong.append(f"{part} {given[:80]!r} for {wanted[:80]!r}")
    return f"{where}: {'; '.join(wrong)}" if wrong else ""


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]


def _chat(response: httpx.Response) -> Answered:
    if not response.headers["content-type"].startswith("text/event-stream"):
        deltas = [response.json()["choices"][0]["message"]]
    else:
        choices = [choice for event in _events(response) for choice in event["choices"]]
        deltas = [choice["delta"] for choice in choices]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    return Answered(
        "".join(delta.get("reasoning_content") or "" for delta in deltas),
        "".join(delta.get("content") or "" for delta in deltas),
        [(call["name"], json.loads(call["arguments"])) for call in calls],
    )


def _messages(response: httpx.Response) -> Answered:
    reasoning, text = "", ""
    calls: list[tuple[str, Any]] = []
    arguments: list[str] = []
    for event in _events(response):
        delta = event.get("delta", {})
        reasoning += delta.get("thinking", "")
        text += delta.get("text", "")
        block = event.get("content_block", {})
        if block.get("type") == "tool_use":
            calls.append((block["name"], None))
            arguments.append("")
        if "partial_json" in delta:
            arguments[-1] += delta["partial_json"]
    named = zip(calls, arguments, strict=True)
    return Answered(reasoning, text, [(name, json.loads(given)) for (name, _), given in named])


def _responses(response: httpx.Response) -> Answered:
    output = _events(response)[-1]["response"]["output"]
    parts: dict[str, list[str]] = {"reasoning": [], "message": []}
    calls = []
    for item in output:
        if item["type"] == "function_call":
            calls.append((item["name"], json.loads(item["arguments"])))
        else:
            shown = item.get("content") or item.get("summary") or ()
            parts[item["type"]] += [part["text"] for part in shown]
    return Answered("".join(parts["reasoning"]), "".join(parts["message"]), calls)


READERS = {
    "/v1/chat/completions": _chat,
    "/v1/messages": _messages,
    "/v1/responses": _responses,
}


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    sys.exit(main())
