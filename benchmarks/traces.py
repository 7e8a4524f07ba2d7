"""Replays recorded sessions of coding agents on a real daemon: what is reused, evaluated, new.

    PYTHONPATH=tests python -m benchmarks.traces FOLDER [--only aider,pi] [--overlap] [--no-save]

FOLDER holds one `.jsonl` file a session, one request a line, as for `benchmarks.replay_requests`,
with the times `t` and `t_end`. Answers are forced to what was recorded; evaluation and checkpoints
are the engine's own. Sessions come one after the other, each request when the one before has ended;
with --overlap all at once, each request when those have ended that had when it was recorded. Before
a new question of a user the daemon has time for itself. In the middle it is stopped and started
again on its store.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from scripted_app import spell_reply

from benchmarks.agent_session import RESULTS
from benchmarks.forced_engine import Asked, ForcedEngine
from benchmarks.new_tokens import NewTokens, RecordingBuilder
from benchmarks.surroundings import surroundings
from daemon.api.app import create_app
from daemon.assemble import Daemon, assemble, embedded_model
from daemon.config import (
    CacheConfig,
    Config,
    EngineConfig,
    ModelConfig,
    ServerConfig,
    default_cache_memory,
    parse_bytes,
)
from daemon.engine.weights.gguf import open_gguf
from daemon.text.messages import Message, ToolCall
from daemon.text.template import ChatTemplate

GRID = 64
SKIPPED_HEADERS = ("content-length", "host", "transfer-encoding", "accept-encoding")
IDLE_TIMEOUT_S = 600

RESTART_GRACE_S = 120
"""Sessions that took agents an hour are replayed in seconds: more waits for the disk at the end."""


class Row(Struct, frozen=True):
    """One request, in tokens."""

    session: str
    seq: int
    answer: str
    prompt: int
    reused: int
    new: int
    plan: str

    @property
    def evaluated(self) -> int:
        """Tokens of the prompt that were evaluated while the client waited."""
        return self.prompt - self.reused

    @property
    def excess(self) -> int:
        """Tokens evaluated beyond the really new ones."""
        return self.evaluated - self.new


class Session(Struct, frozen=True):
    """A file's generations, in order."""

    name: str
    records: list[dict[str, Any]]


class Replay:
    """One daemon, and what it is asked."""

    def __init__(
        self, daemon: Daemon, new: NewTokens, template: ChatTemplate, models: set[str]
    ) -> None:
        service = daemon.service
        self._tokenizer = service.tokenizer
        stop = self._tokenizer.encode("<|im_end|>")[0]
        self.engine = ForcedEngine(service.engine, stop)
        self._builder = RecordingBuilder(
            self._tokenizer, template, daemon.cache.sampled if daemon.cache else None
        )
        self._new = new
        app = create_app(
            msgspec.structs.replace(
                service, engine=self.engine, prompts=self._builder, aliases=tuple(models)
            )
        )
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://qwend", timeout=None
        )

    async def ask(self, session: str, record: dict[str, Any]) -> Row:
        """One recorded request, answered as it was then."""
        reply = as_message(record["response"] or {})
        asked = Asked(lambda prompt: self._spelled(reply, prompt))
        self.engine.expect(asked)
        path = record["path"] + (f"?{record['query']}" if record.get("query") else "")
        headers = {k: v for k, v in record["headers"].items() if k.lower() not in SKIPPED_HEADERS}
        body = json.dumps(record["body"])
        response = await self._http.request(record["method"], path, headers=headers, content=body)
        if response.status_code != 200:
            where = f"{session} {record['seq']}"
            raise SystemExit(f"{where}: {response.status_code} {response.text[:300]}")
        told = self._builder.built[asked.tokens]
        num_new = self._new.count(told)
        self._new.add(told, reply)
        size, plan = len(asked.tokens), response.headers.get("x-cache-plan", "")
        return Row(session, record["seq"], record["answer"], size, asked.num_cached, num_new, plan)

    async def wait_until_idle(self) -> None:
        """Wait until what follows the last replies has been done."""
        body = {"messages": [{"role": "user", "content": "?"}]}
        behind = await self._http.post("/v1/messages/count_tokens", json=body)
        assert behind.status_code == 200, "it went through the thread that gives out work ahead"
        await asyncio.to_thread(self.engine.wait_until_idle, IDLE_TIMEOUT_S)

    def _spelled(self, reply: Message, prompt: tuple[int, ...]) -> tuple[int, ...]:
        text = spell_reply(
            reply.content,
            list(reply.tool_calls),
            reasoning=reply.reasoning,
            thinking_open=self._builder.built[prompt].prompt.thinking_open,
        )
        return tuple(self._tokenizer.encode(text))


ReplayAll = Callable[[Replay, Sequence[Session]], Awaitable[list[Row]]]


async def _run(replay: Replay, sessions: Sequence[Session], replay_all: ReplayAll) -> list[Row]:
    rows = await replay_all(replay, sessions)
    await replay.wait_until_idle()
    return rows


async def one_after_the_other(replay: Replay, sessions: Sequence[Session]) -> list[Row]:
    """Each request when the one before has ended."""
    rows = []
    for session in sessions:
        for record in session.records:
            await _let_user_think(replay, record)
            rows.append(await replay.ask(session.name, record))
            _show_progress(rows[-1])
    return rows


async def as_they_overlapped(replay: Replay, sessions: Sequence[Session]) -> list[Row]:
    """All sessions at once; within each what had ended before a request began, ends first."""

    async def one(session: Session, index: int, tasks: list[asyncio.Task[Row]]) -> Row:
        record = session.records[index]
        earlier = zip(tasks, session.records[:index], strict=False)
        for task, other in list(earlier):
            if other["t_end"] <= record["t"]:
                await task
        await _let_user_think(replay, record)
        row = await replay.ask(session.name, record)
        _show_progress(row)
        return row

    everything: list[asyncio.Task[Row]] = []
    for session in sessions:
        tasks: list[asyncio.Task[Row]] = []
        for index in range(len(session.records)):
            tasks.append(asyncio.create_task(one(session, index, tasks)))
        everything += tasks
    return list(await asyncio.gather(*everything))


async def _let_user_think(replay: Replay, record: dict[str, Any]) -> None:
    turn, _, step = record["answer"].partition(".")
    if turn[-2:] in ("T2", "T3") and step in ("", "0"):
        await replay.wait_until_idle()


def _show_progress(row: Row) -> None:
    why = row.plan if row.excess > GRID else ""
    told = f"{row.session} {row.seq} {row.answer}: {row.prompt} tokens, {row.reused} reused, "
    print(f"{told}{row.new} new, excess {row.excess} {why}", file=sys.stderr)


def as_message(response: dict[str, Any]) -> Message:
    """A recorded answer."""
    calls = (
        ToolCall("", call["name"], json.loads(call["arguments"]))
        for call in response.get("calls") or ()
    )
    return Message(
        role="assistant",
        content=response.get("text") or "",
        reasoning=response.get("reasoning"),
        tool_calls=tuple(calls),
    )


def read_sessions(folder: Path, only: Sequence[str]) -> list[Session]:
    """The sessions of a folder, without probes that ask for no reply."""
    sessions = []
    for file in sorted(folder.glob("*.jsonl")):
        if only and not file.stem.startswith(tuple(only)):
            continue
        records = map(json.loads, file.read_text().splitlines())
        generations = [r for r in records if r["method"] == "POST" and r.get("response")]
        sessions.append(Session(file.stem, generations))
    return sessions


def halves(sessions: Sequence[Session]) -> list[list[Session]]:
    """Before and behind the restart: the first and second half of every session."""
    return [
        [Session(s.name, s.records[: len(s.records) // 2]) for s in sessions],
        [Session(s.name, s.records[len(s.records) // 2 :]) for s in sessions],
    ]


def with_context(model: Path, folder: Path, num_tokens: int) -> Path:
    """A model file that declares so long a context: the one given, or a copy."""
    metadata = open_gguf(model).metadata
    name = f"{metadata['general.architecture']}.context_length"
    if int(metadata[name]) >= num_tokens:
        return model
    key = name.encode()
    copy = folder / model.name
    content = bytearray(model.read_bytes())
    at = content.index(key) + len(key) + 4
    content[at : at + 4] = num_tokens.to_bytes(4, "little")
    copy.write_bytes(content)
    return copy


def measure(arguments: argparse.Namespace) -> tuple[list[Row], int]:
    """A row a request, and the tokens that were evaluated while the daemon was idle."""
    new, num_ahead = NewTokens(), 0
    rows: list[Row] = []
    sessions = read_sessions(arguments.folder, arguments.only)
    models = {record["body"]["model"] for s in sessions for record in s.records}
    replay_all = as_they_overlapped if arguments.overlap else one_after_the_other
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = with_context(arguments.model or embedded_model(), folder, arguments.ctx)
        for half in halves(sessions):
            with _daemon(model, folder / "store", arguments) as daemon:
                template = ChatTemplate(
                    daemon.service.facts.chat_template, daemon.service.tokenizer.control_tokens
                )
                replay = Replay(daemon, new, template, models)
                rows += asyncio.run(_run(replay, half, replay_all))
                num_ahead += replay.engine.num_ahead
    return rows, num_ahead


def _daemon(model: Path, store: Path, arguments: argparse.Namespace) -> Daemon:
    return assemble(
        Config(
            model=ModelConfig(path=model),
            engine=EngineConfig(
                device=arguments.device,
                context=arguments.ctx,
                key_format=arguments.kv,
                value_format=arguments.kv,
            ),
            cache=CacheConfig(
                folder=store,
                budget_bytes=parse_bytes(arguments.cache_size),
                interval_tokens=arguments.checkpoint_interval,
                memory_bytes=default_cache_memory(),
                stop_grace_s=RESTART_GRACE_S,
            ),
            server=ServerConfig(allowed_hosts=("qwend",)),
        )
    )


def table(rows: Sequence[Row]) -> Table:
    """One line a session."""
    shown = Table("session", title="Recorded agents", title_justify="left")
    for heading in ("requests", "prompts", "reused", "evaluated", "really new", "worst excess",
                    "over 64"):  # fmt: skip
        shown.add_column(heading, justify="right")
    for name in dict.fromkeys(row.session for row in rows):
        own = [row for row in rows if row.session == name]
        over = sum(row.excess > GRID for row in own)
        cells = (
            len(own),
            sum(row.prompt for row in own),
            sum(row.reused for row in own),
            sum(row.evaluated for row in own),
            sum(row.new for row in own),
            max(row.excess for row in own),
            over,
        )
        shown.add_row(name, *(f"{cell:,}" for cell in cells), style="bold red" if over else "")
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; 1 when a request evaluated more than it should."""
    parser = argparse.ArgumentParser(prog="traces", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAMES")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--model", type=Path, help="GGUF file (default: the embedded model)")
    parser.add_argument("--ctx", type=int, default=65_536)
    parser.add_argument("--checkpoint-interval", type=int, metavar="TOKENS", help="as of serve")
    parser.add_argument("--cache-size", default="20G", help="as of serve")
    parser.add_argument("--kv", default="bf16", help="format of keys and values, as of serve")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    rows, num_ahead = measure(arguments)
    Console(width=120).print(table(rows))
    print(
        f"{num_ahead:,} tokens evaluated while nobody waited; {time.perf_counter() - began:.0f} s"
    )
    if not arguments.no_save:
        figures = {**surroundings(), "overlap": arguments.overlap,
                   "interval": arguments.checkpoint_interval, "ahead": num_ahead,
                   "rows": msgspec.to_builtins(rows)}  # fmt: skip
        target = RESULTS / f"traces-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        target.write_text(json.dumps(figures, indent=2) + "\n")
        print(target)
    return int(any(row.excess > GRID for row in rows))


if __name__ == "__main__":
    sys.exit(main())
