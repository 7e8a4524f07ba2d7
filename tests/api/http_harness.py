"""Ways to talk to the application: in process by ASGI, or over loopback with a real server."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fakes import RememberedReplies, ScriptedEngine
from starlette.applications import Starlette

from daemon.api.server import Server, bind
from daemon.api.service import Service

USER = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class ApiHarness:
    app: Starlette
    service: Service
    engine: ScriptedEngine
    replies: RememberedReplies

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://qwend")

    async def post(self, **body: Any) -> httpx.Response:
        async with self.client() as client:
            # httpx refuses what is no JSON (Infinity); the server shall see it and refuse it.
            content = json.dumps({"messages": USER, **body})
            return await client.post("/v1/chat/completions", content=content)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON events of a whole stream, which must end with [DONE]."""
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


@contextmanager
def running_server() -> Iterator[Callable[[ApiHarness], str]]:
    """Gives a function that serves an app on a free port of loopback; ends them all."""
    with ExitStack() as stack:
        yield lambda api: stack.enter_context(serving(api.app))


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serves an ASGI application that has `create_app`'s state; gives its URL."""
    ready = threading.Event()
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    with bind("127.0.0.1", 0) as listener:
        server = Server(app, on_ready)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(10)
            yield urls[0]
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()
