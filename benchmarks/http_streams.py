"""Times the HTTP side alone: many streams at once from an engine that costs nothing.

    PYTHONPATH=tests python -m benchmarks.http_streams [--connections 64] [--rate 5000]

The server is the real one, in a process of its own, over an engine that gives each stream a token
a step, `rate` tokens a second in all. The client reads all connections in another process. Shown
are the tokens that arrived a second, and the gaps between the arrivals of one stream. Two cores
are enough; a machine that others use shows it in the gaps.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from fakes import RememberedReplies
from rich.console import Console
from rich.table import Table
from scripted_app import scripted_service, text_side

from daemon.api.app import create_app
from daemon.api.server import Server, bind
from daemon.engine.requests import (
    Deliver,
    EngineInfo,
    Finished,
    GenerationRequest,
    Started,
    TokenSampled,
)

USER = [{"role": "user", "content": "hello"}]
DIALECTS: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "chat": ("/v1/chat/completions", {"messages": USER}, b'"content":"'),
    "messages": ("/v1/messages", {"messages": USER, "max_tokens": 10**6}, b'"text_delta"'),
    "responses": ("/v1/responses", {"input": "hello"}, b"event: response.output_text.delta"),
}


class PacedEngine:
    """Gives every stream the same token at a fixed rate, until it has had `num_tokens`."""

    def __init__(self, closing: Sequence[int], token: int, rate: float, num_tokens: int) -> None:
        self.info = EngineInfo(
            model_name="tiny-coder",
            context_length=1 << 20,
            vocab_size=8192,
            num_parameters=0,
            backend="paced",
            max_sequences=1024,
        )
        self._closing = closing
        self._token = token
        self._rate = rate
        self._num_tokens = num_tokens
        self._streams: dict[str, Deliver] = {}
        self._lock = threading.Lock()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Join at the next step."""
        deliver(Started(len(request.tokens), 0))
        for token in self._closing:
            deliver(TokenSampled(token))
        with self._lock:
            self._streams[request.id] = deliver

    def cancel(self, request_id: str) -> None:
        """Leave."""
        with self._lock:
            self._streams.pop(request_id, None)

    def run(self, num_streams: int) -> None:
        """Wait for all streams, then step."""
        while len(self._streams) < num_streams:
            time.sleep(0.01)
        time.sleep(0.5)
        step_s, due = num_streams / self._rate, time.perf_counter()
        for _ in range(self._num_tokens):
            with self._lock:
                streams = list(self._streams.values())
            for deliver in streams:
                deliver(TokenSampled(self._token))
            due += step_s
            time.sleep(max(0.0, due - time.perf_counter()))
        for deliver in streams:
            deliver(Finished("stop", 9, 0, (), 1.0, 1.0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every dialect."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5000, help="tokens a second, in all")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--dialects", nargs="+", choices=DIALECTS, default=list(DIALECTS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options)
        return
    table = Table("dialect", "tokens/s", "gap p50 ms", "p90", "p99", "max", "server CPU s")
    for dialect in options.dialects:
        table.add_row(dialect, *measure(dialect, options))
    Console().print(table)


def serve(options: argparse.Namespace) -> None:
    """The server's process: prints its port, serves, and prints the time it took when told."""
    text = text_side()
    encode = text.tokenizer.encode
    closing = encode("\n</think>\n\n") if options.serve != "messages" else []
    num_tokens = int(options.seconds * options.rate / options.connections)
    engine = PacedEngine(closing, encode(" a")[0], options.rate, num_tokens)
    service = scripted_service(text, engine, RememberedReplies(), None)
    with bind("127.0.0.1", 0) as listener:
        server = Server(create_app(service), lambda url: print(url.rpartition(":")[2], flush=True))
        thread = threading.Thread(target=engine.run, args=(options.connections,), daemon=True)
        thread.start()
        stopping = threading.Thread(target=lambda: (sys.stdin.read(), server.stop()), daemon=True)
        stopping.start()
        server.run(sockets=[listener])
    text.constrainer.close()
    print(time.process_time(), flush=True)


def measure(dialect: str, options: argparse.Namespace) -> list[str]:
    """One row."""
    command = [sys.executable, "-m", "benchmarks.http_streams", "--serve", dialect]
    for name in ("connections", "rate", "seconds"):
        command += [f"--{name}", str(getattr(options, name))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    port = int(server.stdout.readline())
    arrivals = asyncio.run(read_all(port, dialect, options.connections))
    server.stdin.close()
    cpu_s = float(server.stdout.read() or 0)
    server.wait(20)
    # The first fifth is left out: all streams begin at once.
    times = sorted(at for stream in arrivals for at, _ in stream)
    begin = times[0] + (times[-1] - times[0]) / 5
    steady = [[entry for entry in stream if entry[0] >= begin] for stream in arrivals]
    num_tokens = sum(count for stream in steady for _, count in stream)
    gaps = sorted(
        (after[0] - before[0]) * 1e3
        for stream in steady
        for before, after in zip(stream, stream[1:], strict=False)
    )
    shares = [gaps[int(len(gaps) * share)] for share in (0.5, 0.9, 0.99)] + [gaps[-1]]
    rate = num_tokens / (times[-1] - begin)
    return [f"{rate:,.0f}", *(f"{gap:.1f}" for gap in shares), f"{cpu_s:.1f}"]


async def read_all(port: int, dialect: str, num: int) -> list[list[tuple[float, int]]]:
    """Every connection's arrivals: when, and how many tokens."""
    return await asyncio.gather(*(read_one(port, dialect) for _ in range(num)))


async def read_one(port: int, dialect: str) -> list[tuple[float, int]]:
    """Reads one stream to its end."""
    path, body, mark = DIALECTS[dialect]
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
    arrivals, rest = [], b""
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        data = rest + data
        count = data.count(mark)
        # A mark may be cut by the end of what was read, and must be counted once.
        rest = data[-(len(mark) - 1) :]
        if count:
            arrivals.append((now, count))
    writer.close()
    return arrivals


if __name__ == "__main__":
    main()
