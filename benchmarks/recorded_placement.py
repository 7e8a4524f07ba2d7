"""Plays recorded agents' prompts through placement and eviction alone, for a model of any size.

    PYTHONPATH=tests python -m benchmarks.recorded_placement FOLDER [--size 27b] [--budget 200G]

FOLDER is that of `benchmarks.traces`, whose requests are built into prompts by the application
over a scripted engine, and what is evaluated before the next turn with them; no model computes.
Prints every request that would evaluate more than 64 tokens beyond the really new ones, and sums.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fakes import RememberedReplies, ScriptedEngine
from msgspec import Struct
from scripted_app import TextSide, scripted_engine, scripted_service, spell_reply, text_side

from benchmarks.checkpoint_contenders import Qwend
from benchmarks.coding_traces import MODEL, TraceRequest
from benchmarks.model_sizes import SIZES, ModelSizes
from benchmarks.new_tokens import NewTokens, RecordingBuilder
from benchmarks.replay_requests import CONTEXT
from benchmarks.traces import GRID, SKIPPED_HEADERS, Session, as_message, read_sessions
from daemon.api.app import create_app
from daemon.cache.policy import Sizes
from daemon.cache.prefix_hash import PrefixChain
from daemon.cache.store import footprint
from daemon.checkpoint import PAGE_TOKENS
from daemon.config import parse_bytes
from daemon.engine.requests import GenerationRequest
from daemon.text.messages import Message

KV_BYTES = {"bf16": 2.0, "q8_0": 34 / 32, "f32": 4.0}
SECOND_US = 1_000_000


class Prompt(Struct, frozen=True):
    """What the engine was given. `name` is "" for work while it was idle."""

    name: str
    time_us: int
    request: GenerationRequest
    num_new: int


class Script:
    """What the next request is answered."""

    def __init__(self, text: TextSide) -> None:
        self.reply = Message(role="assistant")
        self._text = text

    def spell(self, request: GenerationRequest) -> str:
        end = self._text.tokenizer.decode(request.tokens[-16:])
        return spell_reply(
            self.reply.content,
            list(self.reply.tool_calls),
            reasoning=self.reply.reasoning,
            thinking_open=end.rfind("<think>") > end.rfind("</think>"),
        )


async def prompts_of(sessions: Sequence[Session]) -> list[Prompt]:
    """All prompts of all sessions, one after the other, each with the work ahead behind it."""
    found: list[Prompt] = []
    with _scripted() as (text, script, engine):
        replies, new = RememberedReplies(), NewTokens()
        builder = RecordingBuilder(text.tokenizer, text.template, replies)
        service = scripted_service(text, engine, replies, None)
        models = {record["body"]["model"] for s in sessions for record in s.records}
        app = create_app(
            msgspec.structs.replace(
                service, prompts=builder, works_ahead=True, aliases=tuple(models)
            )
        )
        start_us = 0
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://qwend"
        ) as client:
            for session in sessions:
                for record in session.records:
                    script.reply = as_message(record["response"] or {})
                    engine.requests.clear()
                    await _ask(client, record)
                    asked, *ahead = engine.requests
                    told = builder.built[asked.tokens]
                    name = f"{session.name} {record['seq']} {record['answer']}"
                    time_us = start_us + int(record["t"] * SECOND_US)
                    found.append(Prompt(name, time_us, asked, new.count(told)))
                    new.add(told, script.reply)
                    found += [Prompt("", time_us, idle, 0) for idle in ahead]
                start_us = found[-1].time_us + 60 * SECOND_US
    return found


@contextmanager
def _scripted() -> Iterator[tuple[TextSide, Script, ScriptedEngine]]:
    text = text_side()
    script = Script(text)
    engine = scripted_engine(text, script.spell, context_length=CONTEXT)
    try:
        yield text, script, engine
    finally:
        engine.stop()
        text.constrainer.close()


async def _ask(client: httpx.AsyncClient, record: dict[str, Any]) -> None:
    headers = {k: v for k, v in record["headers"].items() if k.lower() not in SKIPPED_HEADERS}
    query = f"?{record['query']}" if record.get("query") else ""
    content = json.dumps(record["body"])
    answer = await client.post(f"{record['path']}{query}", headers=headers, content=content)
    answer.raise_for_status()
    behind = {"messages": [{"role": "user", "content": "?"}]}
    (await client.post("/v1/messages/count_tokens", json=behind)).raise_for_status()


def sizes_of(model: ModelSizes, kv_format: str, budget_bytes: int) -> Sizes:
    """What a checkpoint of a model takes."""
    attention = sum(model.is_attention(layer) for layer in range(model.layers))
    rule = model.v_heads * model.state_dim**2 + (model.conv_width - 1) * model.conv_dim
    token = attention * model.kv_heads * model.head_dim * 2 * KV_BYTES[kv_format]
    return Sizes(
        state_bytes=footprint((model.layers - attention) * rule * 4),
        page_bytes=footprint(int(token * PAGE_TOKENS)),
        budget_bytes=budget_bytes,
    )


def play(prompts: Sequence[Prompt], sizes: Sizes) -> dict[str, int]:
    """Tokens evaluated beyond the really new ones, by request."""
    store = Qwend(sizes)
    excess = {}
    for prompt in prompts:
        tokens = prompt.request.tokens
        reused = store.reused(
            TraceRequest(
                time_us=prompt.time_us,
                num_tokens=len(tokens),
                hashes=tuple(PrefixChain(MODEL, tokens).hashes),
                boundaries=prompt.request.boundaries,
                is_first=False,
                num_new=prompt.num_new,
            )
        )
        if prompt.name:
            excess[prompt.name] = len(tokens) - reused - prompt.num_new
    print(f"{store.written_bytes / 1e9:.1f} GB written, {store.index.num_states} states kept")
    return excess


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAMES")
    parser.add_argument("--size", choices=sorted(SIZES), default="27b", help="(%(default)s)")
    parser.add_argument("--kv", choices=sorted(KV_BYTES), default="q8_0", help="(%(default)s)")
    parser.add_argument("--budget", default="200G", help="for checkpoints (%(default)s)")
    arguments = parser.parse_args()
    sizes = sizes_of(SIZES[arguments.size], arguments.kv, parse_bytes(arguments.budget))
    prompts = asyncio.run(prompts_of(read_sessions(arguments.folder, arguments.only)))
    excess = play(prompts, sizes)
    for name, num_tokens in excess.items():
        if num_tokens > GRID:
            print(f"{name}: {num_tokens:,} beyond")
    num_new = sum(prompt.num_new for prompt in prompts)
    print(f"{len(excess)} requests, {num_new:,} tokens new, {sum(excess.values()):,} beyond")
    return 0


if __name__ == "__main__":
    sys.exit(main())
