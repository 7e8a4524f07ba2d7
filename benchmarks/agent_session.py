"""Runs a coding agent's session against a server and shows what each request evaluated.

    python -m benchmarks.agent_session [--model FILE.gguf] [--no-save] [-- flags of qwend serve]
    python -m benchmarks.agent_session --url http://127.0.0.1:8080 --model FILE.gguf

Without --url it starts `qwend serve` on an empty store, and ends it with kill -9 before the last
request. With --url any OpenAI server is asked, llama-server too; --model names the file that it
serves, whose vocabulary and template say which tokens of a request are really new: those behind
the first message that differs from what the server was sent before, however the template shows
the rest. Each answer is ended at its first token by a bias, and the client goes on with a scripted
one: so only the evaluation of prompts is compared, and the scripted answer is new to the server.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.agent_conversation import Message, Request, session
from benchmarks.surroundings import surroundings
from daemon.api.openai_chat_messages import ChatMessage, to_messages
from daemon.assemble import embedded_model
from daemon.engine.weights.gguf import open_gguf
from daemon.text.messages import ToolSpec
from daemon.text.prompt import Prompt, PromptBuilder
from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
GRID = 64
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 600, 600


class Row(msgspec.Struct, frozen=True):
    """One request, in tokens and seconds; `cause` is what qwend says of it."""

    name: str
    prompt: int
    reused: int
    evaluated: int
    new: int
    seconds: float
    cause: str

    @property
    def excess(self) -> int:
        """Tokens evaluated beyond the really new ones."""
        return self.evaluated - self.new


class NoReplies:
    """Remembers no replies: the scripted ones were never sampled."""

    def recall(self, frame_text: str) -> None:
        """Nothing is remembered."""
        return None


class NewTokens:
    """Counts which tokens of a request no earlier request told the server."""

    def __init__(self, model: Path) -> None:
        metadata = open_gguf(model).metadata
        tokenizer = Tokenizer.from_metadata(metadata)
        source = str(metadata["tokenizer.chat_template"])
        template = ChatTemplate(source, tokenizer.control_tokens)
        self._builder = PromptBuilder(tokenizer, template, NoReplies())
        self.end_of_reply = min(tokenizer.stop_tokens)
        self._earlier: list[tuple[Request, Prompt]] = []

    def count(self, request: Request) -> tuple[int, int]:
        """Tokens of the prompt, and those of them behind all that was sent before."""
        prompt = self._build(request)
        known = max((self._num_known(request, prompt, *old) for old in self._earlier), default=0)
        self._earlier.append((request, prompt))
        return len(prompt.tokens), len(prompt.tokens) - known

    def _build(self, request: Request) -> Prompt:
        messages = msgspec.convert(list(request.messages), list[ChatMessage])
        tools = [ToolSpec(tool["function"]["name"], {}, tool) for tool in request.tools]
        return self._builder.build(to_messages(messages), tools)

    def _num_known(self, request: Request, prompt: Prompt, old: Request, old_prompt: Prompt) -> int:
        """Up to the first message that differs, and as far as its own text is the same."""
        if request.tools != old.tools:
            return _common(prompt.tokens, old_prompt.tokens)
        differing = _common(request.messages, old.messages)
        frame = next((f for f in prompt.frames if f.messages.stop > differing), prompt.frames[-1])
        old_frame = next((f for f in old_prompt.frames if f.messages.stop > differing), None)
        if old_frame is None or frame.messages != old_frame.messages:
            return frame.start
        return frame.start + _common(
            prompt.tokens[frame.start :], old_prompt.tokens[old_frame.start :]
        )


class Server:
    """What is asked: a server at a URL, or a qwend of our own."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=self.url, timeout=ANSWER_TIMEOUT_S)

    def ask(self, request: Request, end_of_reply: int) -> tuple[int, int, float, str]:
        """Tokens of the prompt, tokens reused, seconds until one token is there, and why."""
        body: dict[str, Any] = {
            "messages": list(request.messages),
            "max_tokens": 8,
            "temperature": 0,
            "logit_bias": {str(end_of_reply): 100},
        }
        if request.tools:
            body["tools"] = list(request.tools)
        began = time.perf_counter()
        response = self._http.post("/v1/chat/completions", json=body)
        seconds = time.perf_counter() - began
        if response.status_code != 200:
            raise SystemExit(f"{self.url} answered {response.status_code}: {response.text[:500]}")
        answer = response.json()
        cause = re.search(r"cause=(\w+)", response.headers.get("x-cache-plan", ""))
        return *_usage(answer), seconds, cause[1] if cause else ""

    def name(self) -> str:
        """Which model, of which server."""
        model = self._http.get("/v1/models").raise_for_status().json()["data"][0]
        return f"{model['id']} ({model.get('owned_by', 'unknown')})"


def _usage(answer: dict[str, Any]) -> tuple[int, int]:
    usage, timings = answer["usage"], answer.get("timings") or {}
    details = usage.get("prompt_tokens_details") or {}
    return usage["prompt_tokens"], details.get("cached_tokens", timings.get("cache_n", 0))


@contextmanager
def own_qwend(store: Path, model: Path | None, flags: Sequence[str]) -> Iterator[Server]:
    """`qwend serve`, ended by kill -9."""
    chosen = ["--model", str(model)] if model else []
    command = [sys.executable, "-m", "daemon", "serve", "--port", "0", "--cache-dir", str(store)]
    process = subprocess.Popen(
        [*command, *chosen, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        found = next(filter(None, (re.search(r" at (http://\S+)/v1 ", x) for x in process.stdout)))
        yield Server(found[1])
    except StopIteration:
        raise SystemExit("qwend did not start") from None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run(requests: Sequence[Request], server: Server, new: NewTokens, pause_s: float) -> list[Row]:
    """Ask one after the other; before a turn of the user's, the server has time for itself."""
    rows = []
    for request in requests:
        if request.is_turn:
            time.sleep(pause_s)
        counted, num_new = new.count(request)
        prompt, reused, seconds, cause = server.ask(request, new.end_of_reply)
        if prompt != counted:
            raise SystemExit(f"{request.name}: {prompt} tokens there, {counted} by --model")
        rows.append(
            Row(request.name, prompt, reused, prompt - reused, num_new, round(seconds, 3), cause)
        )
    return rows


def measure(arguments: argparse.Namespace) -> tuple[str, list[Row]]:
    """The whole session; the server's name and a row a request."""
    requests: list[Request] = list(session())
    new = NewTokens(arguments.model or embedded_model())
    before = [request for request in requests if not request.after_restart]
    if arguments.url:
        server = Server(arguments.url)
        return server.name(), run(before, server, new, arguments.pause)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        with own_qwend(store, arguments.model, arguments.flags) as server:
            rows = run(before, server, new, arguments.pause)
            name = server.name()
            time.sleep(arguments.pause)
        with own_qwend(store, arguments.model, arguments.flags) as server:
            after = [request for request in requests if request.after_restart]
            return name, rows + run(after, server, new, 0)


def table(rows: Sequence[Row]) -> Table:
    """One line a request; what exceeds the grid stands out."""
    shown = Table("request", title="A coding agent's session", title_justify="left")
    for heading in ("prompt", "reused", "evaluated", "really new", "seconds", "why more"):
        shown.add_column(heading, justify="left" if heading == "why more" else "right")
    for row in rows:
        style = "bold red" if row.excess > GRID else ""
        cells = (row.prompt, row.reused, row.evaluated, row.new)
        shown.add_row(
            row.name,
            *(f"{cell:,}" for cell in cells),
            f"{row.seconds:.2f}",
            row.cause if row.excess > GRID else "",
            style=style,
        )
    return shown


def _common(one: Sequence[Message] | Sequence[int], other: Sequence[Any]) -> int:
    size = min(len(one), len(other))
    return next((i for i in range(size) if one[i] != other[i]), size)


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="agent_session", description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="a running server; the restart is left out then")
    parser.add_argument("--model", type=Path, help="GGUF file (default: the embedded model)")
    parser.add_argument(
        "--pause", type=float, default=60, metavar="S",
        help="time that the server has for itself before a turn and before it is killed (60)",
    )  # fmt: skip
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("flags", nargs="*", help="further flags of qwend serve, after --")
    arguments = parser.parse_args(argv)
    server, rows = measure(arguments)
    Console(width=120).print(table(rows))
    if not arguments.no_save:
        figures = {**surroundings(), "server": server, "rows": msgspec.to_builtins(rows)}
        target = RESULTS / f"agent_session-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        target.write_text(json.dumps(figures, indent=2) + "\n")
        print(target)


if __name__ == "__main__":
    main()
