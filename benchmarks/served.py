"""Times what a client sees: tokens a second of streams that a server decodes side by side.

    python -m benchmarks.served [--model FILE.gguf] [--streams 1 8] [-- flags of qwend serve]
    python -m benchmarks.served --url http://127.0.0.1:8080 --model FILE.gguf

Beside `benchmarks.decode`, which times the steps alone, this has everything: sampling, scheduling,
text, HTTP. Without --url it starts `qwend serve` on an empty store. With --url any OpenAI server is
asked, llama-server too. The reply may not end by itself: its end is made impossible by a bias.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.agent_session import RESULTS, Server, own_qwend
from benchmarks.surroundings import surroundings
from daemon.assemble import embedded_model
from daemon.engine.weights.gguf import open_gguf
from daemon.text.tokenizer import Tokenizer

PROMPT = "Once there was a program that "
TIMEOUT_S = 600


async def _stream(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float, int]:
    """When the first and the last piece of a reply came, and how many tokens it has."""
    first = last = 0.0
    num_tokens = 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("choices") and chunk["choices"][0].get("text"):
                last = time.perf_counter()
                first = first or last
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return first, last, num_tokens


async def measure(url: str, num_streams: int, num_tokens: int, banned: Sequence[int]) -> float:
    """Tokens a second of all streams together, from the first token on."""
    bodies = [
        {
            "prompt": f"{PROMPT}{number}",
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in banned},
        }
        for number in range(num_streams)
    ]
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
        replies = await asyncio.gather(*(_stream(http, body) for body in bodies))
    began, ended = min(reply[0] for reply in replies), max(reply[1] for reply in replies)
    return sum(reply[2] - 1 for reply in replies) / (ended - began)


def run(server: Server, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of streams; the first reply of all is not counted."""
    tokenizer = Tokenizer.from_metadata(open_gguf(arguments.model or embedded_model()).metadata)
    banned = sorted(tokenizer.stop_tokens)
    rows = []
    asyncio.run(measure(server.url, max(arguments.streams), 8, banned))
    for num_streams in arguments.streams:
        rate = asyncio.run(measure(server.url, num_streams, arguments.tokens, banned))
        rows.append({"streams": num_streams, "tokens_per_s": round(rate, 1)})
        print(f"{num_streams:7}  {rate:7.1f}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="served", description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--model", type=Path, help="GGUF file (default: the embedded model)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=512, help="of each reply (512)")
    parser.add_argument("flags", nargs="*", help="further flags of qwend serve, after --")
    arguments = parser.parse_args(argv)
    print("streams  tokens/s")
    if arguments.url:
        server = Server(arguments.url)
        name, rows = server.name(), run(server, arguments)
    else:
        with (
            tempfile.TemporaryDirectory() as store,
            own_qwend(Path(store), arguments.model, arguments.flags) as server,
        ):
            name, rows = server.name(), run(server, arguments)
    figures = {**surroundings(), "server": name, "tokens": arguments.tokens, "rows": rows}
    target = RESULTS / f"served-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    target.write_text(json.dumps(figures, indent=2) + "\n")
    print(target)


if __name__ == "__main__":
    main()
