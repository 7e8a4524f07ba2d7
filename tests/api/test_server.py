"""The server: its address, a port in use, the way it ends on a signal."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from daemon.api.server import bind, url_of
from daemon.errors import ConfigError, PortInUse

ROOT = Path(__file__).parents[2]

SERVE = """
    import sys
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route
    import asyncio
    from daemon.api.server import Server, bind

    class Replies:
        def __init__(self):
            self.closed = asyncio.Event()
        def close(self):
            print("closed", flush=True)

    async def root(request):
        async def body():
            while True:
                yield b"x"
                await asyncio.sleep(0.05)
        return StreamingResponse(body())

    app = Starlette(routes=[Route("/", root)])
    app.state.generations = Replies()
    with bind("127.0.0.1", 0) as listener:
        Server(app, lambda url: print(url, flush=True)).serve_on(listener)
    print("returned", flush=True)
"""


def test_port_in_use() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse, match=f"Port {port} .* is in use"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 70000)]
)
def test_an_address_that_cannot_be_used(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="Cannot listen"):
        bind(host, port)


def test_url() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener).startswith("http://127.0.0.1:")


def start() -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline().rsplit(":", 1)[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_control_returns(number: signal.Signals) -> None:
    process, _ = start()
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert out.split() == ["closed", "returned"]
    assert process.returncode == 0
    assert "Traceback" not in error


def test_a_second_interrupt_waits_for_nothing() -> None:
    process, port = start()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=4)  # less than CLOSE_TIMEOUT_S
    assert out.split() == ["returned"]
