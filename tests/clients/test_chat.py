"""The terminal chat and its client, against a scripted HTTP transport."""

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console

from clients.chat import Chat, main, stats_table
from clients.client import CallPart, Client, Part, ServerRefused, ServerUnreachable, Usage

STATS = {
    "total": {
        "requests": 3,
        "tokens_reused": 9000,
        "tokens_evaluated": 1000,
        "tokens_generated": 50,
        "hit_rate": 0.9,
    },
    "windows": {},
}
USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 12},
}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


ANSWER = [
    delta(role="assistant", content=""),
    delta(),
    delta(reasoning_content="Hm."),
    delta(content="Hello "),
    delta(content="[bold]you[/bold]"),
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": USAGE},
]


class Body(httpx.SyncByteStream):
    """A stream's events; an exception among them is raised in its place."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            yield f"data: {json.dumps(item)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    def close(self) -> None:
        self.closed = True


class FakeServer(httpx.BaseTransport):
    """Answers chats with the given streams, one after the other, and keeps the requests."""

    def __init__(self, *streams: Body | httpx.Response | Exception) -> None:
        self.streams = list(streams)
        self.bodies: list[dict[str, Any]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/cache/stats":
            return httpx.Response(200, json=STATS)
        self.bodies.append(json.loads(request.content))
        answer = self.streams.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, stream=answer)


def keyboard(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting = iter(lines)

    def read_line(_: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read_line


def talk(server: FakeServer, *lines: str | type[BaseException]) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=False)
    with Client("http://qwend", transport=server) as client:
        Chat(client, console, keyboard(*lines)).run()
    return screen.getvalue()


def test_an_answer_is_shown_as_it_is_and_sent_back() -> None:
    server = FakeServer(Body(ANSWER), Body(ANSWER))
    screen = talk(server, "hello", "more", "/quit")
    assert "Hm.\n\nHello [bold]you[/bold]\n4 tokens" in screen
    assert "12 of 20 prompt tokens reused" in screen
    first, second = server.bodies
    assert first["messages"] == [{"role": "user", "content": "hello"}]
    assert first["stream_options"] == {"include_usage": True}
    assert second["messages"][1:] == [
        {"role": "assistant", "content": "Hello [bold]you[/bold]", "reasoning_content": "Hm."},
        {"role": "user", "content": "more"},
    ]


def test_interrupt_stops_the_answer_and_not_the_program() -> None:
    cut = Body([*ANSWER[:4], KeyboardInterrupt()])
    server = FakeServer(cut, Body(ANSWER))
    screen = talk(server, "hello", KeyboardInterrupt, "again")
    assert "stopped" in screen
    assert cut.closed
    assert server.bodies[1]["messages"][1]["content"] == "Hello "


def test_commands() -> None:
    server = FakeServer(Body(ANSWER), Body(ANSWER))
    screen = talk(server, "a", "/reset", "/think", "b", "/stats", "/help", "/nothing", "")
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "b"}]
    assert server.bodies[1]["enable_thinking"] is False
    assert "9,000" in screen
    assert "90.0%" in screen
    assert "/reset    forget the conversation" in screen
    assert "No command /nothing" in screen


def test_several_lines_between_fences() -> None:
    server = FakeServer(Body(ANSWER))
    talk(server, '"""', "one", "", "two", '"""')
    assert server.bodies[0]["messages"][0]["content"] == "one\n\ntwo"


def test_an_error_is_one_line_and_keeps_the_conversation() -> None:
    refusal = httpx.Response(400, json={"error": {"message": "Too long."}})
    server = FakeServer(refusal, httpx.ConnectError("no"), Body(ANSWER))
    screen = talk(server, "a", "b", "c")
    assert "Too long.\n" in screen
    assert "No server answers at http://qwend" in screen
    assert server.bodies[2]["messages"] == [{"role": "user", "content": "c"}]


def test_client_parts() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    body = Body([delta(tool_calls=[call]), ANSWER[-1]])
    with Client("http://qwend/v1", transport=FakeServer(body)) as client:
        parts = list(client.chat([]))
    assert parts == [
        Part(calls=(CallPart(0, "c", "f", "{}"),)),
        Part(usage=Usage(20, 12, 4)),
    ]


def test_an_error_in_the_middle_of_a_stream() -> None:
    body = Body([ANSWER[0], {"error": {"message": "The GPU fell off."}}])
    with Client("http://qwend", transport=FakeServer(body)) as client:
        with pytest.raises(ServerRefused, match="fell off"):
            list(client.chat([]))


def test_a_stream_that_breaks_off() -> None:
    body = Body([ANSWER[0], httpx.ReadError("reset")])
    with Client("http://qwend", transport=FakeServer(body)) as client:
        with pytest.raises(ServerUnreachable, match="reset"):
            list(client.chat([]))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[::1"])
def test_no_server_is_one_clear_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


def test_stats_table_has_a_row_a_window() -> None:
    store = {"num_checkpoints": 5, "num_bytes": 3 * 2**20}
    table = stats_table({**STATS, "windows": {"60": STATS["total"]}, "store": store})
    assert table.row_count == 2
    assert table.caption == "5 checkpoints, 3 MiB"
