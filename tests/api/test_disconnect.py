"""A client that goes away: its request ends within a step, in whichever phase it is."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import Script
from http_harness import USER, ApiHarness, events

from daemon.api.service import Limits
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]
Serve = Callable[[ApiHarness], str]


@pytest.fixture
def endless(tokenizer: Tokenizer) -> Script:
    return Script(tokenizer.encode("</think>\n\nword"), endless=True, step_s=0.005)


LONG_PREFILL = Script(prefill_steps=10**9, step_s=0.005)


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_cancels(
    make_api: MakeApi, serve: Serve, endless: Script, stream: bool, phase: str
) -> None:
    api = make_api(LONG_PREFILL if phase == "prefill" else endless)
    url = httpx.URL(serve(api))
    body = json.dumps({"messages": USER, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        assert eventually(lambda: bool(api.engine.requests))
        steps = api.engine.num_steps
        assert eventually(lambda: api.engine.num_steps > steps + 5)
        assert api.engine.cancelled == []
    assert api.engine.wait_until_idle(10)
    assert api.engine.cancelled == [api.engine.requests[0].id]
    assert eventually(lambda: api.service.metrics.snapshot().finishes == {"cancelled": 1})


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/messages", {"messages": USER, "max_tokens": 10**6}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": -1}),
    ],
)
def test_a_closed_connection_cancels_in_every_dialect(
    make_api: MakeApi, serve: Serve, endless: Script, path: str, asked: dict[str, Any]
) -> None:
    api = make_api(endless)
    url = serve(api) + path
    with httpx.stream("POST", url, json={**asked, "stream": True}) as response:
        received = response.iter_bytes()
        assert next(received)
        assert eventually(lambda: api.engine.num_steps > 5)
    assert api.engine.wait_until_idle(10)
    assert sorted(api.engine.cancelled) == sorted(request.id for request in api.engine.requests)


def test_stopping_the_server_ends_streams_with_an_error(
    make_api: MakeApi, serve: Serve, endless: Script
) -> None:
    api = make_api(endless)
    url = serve(api) + "/v1/chat/completions"
    with httpx.stream("POST", url, json={"messages": USER, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        api.app.state.generations.close()
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_stopped"
    refused = httpx.post(url, json={"messages": USER})
    assert refused.status_code == 503


def test_signs_of_life_in_a_long_prefill(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    slow = Script(tokenizer.encode("</think>\n\nHi"), prefill_steps=40, step_s=0.01)
    api = make_api(slow, limits=Limits(sign_of_life_s=0.05))
    response = asyncio.run(api.post(stream=True))
    chunks = events(response.text)
    empty = [c for c in chunks[1:-1] if c["choices"][0]["delta"] == {}]
    assert len(empty) >= 3
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in empty)


def test_signs_of_life_while_a_call_is_written(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    text = "</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\n" + "word " * 60
    api = make_api(Script(tokenizer.encode(text), step_s=0.005), limits=Limits(sign_of_life_s=0.05))
    chunks = events(asyncio.run(api.post(stream=True)).text)
    empty = [c for c in chunks[1:-1] if c["choices"][0]["delta"] == {}]
    assert len(empty) >= 3


def test_a_client_that_never_reads_is_ended(make_api: MakeApi, endless: Script) -> None:
    api = make_api(
        Script(endless.tokens, endless=True, step_s=0.0005), limits=Limits(max_pending_events=50)
    )

    async def never_read() -> list[dict[str, object]]:
        sent: list[dict[str, object]] = []
        body = json.dumps({"messages": USER, "stream": True}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        ended = asyncio.Event()

        async def receive() -> dict[str, object]:
            for message in messages:
                return message
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)
            if len(sent) == 2:
                assert await asyncio.to_thread(api.engine.wait_until_idle, 10)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [],
            "query_string": b"",
        }
        await api.app(scope, receive, send)  # type: ignore[arg-type]
        ended.set()
        return sent

    sent = asyncio.run(never_read())
    text = b"".join(message.get("body", b"") for message in sent)  # type: ignore[misc]
    assert b"reads too slowly" in text
    assert api.service.metrics.snapshot().finishes == {"unread": 1}


def test_a_request_that_takes_too_long_is_ended(make_api: MakeApi, endless: Script) -> None:
    api = make_api(endless, limits=Limits(request_timeout_s=0.1))
    response = asyncio.run(api.post())
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert api.engine.wait_until_idle()
    last = events_until_error(asyncio.run(api.post(stream=True)).text)
    assert last["error"]["code"] == "timeout"
    assert api.service.metrics.snapshot().finishes == {"timeout": 2}


def test_a_request_whose_turn_does_not_come_is_told_to_come_back(make_api: MakeApi) -> None:
    stuck = Script(hold_s=0.3)
    api = make_api(stuck, limits=Limits(queue_timeout_s=0.05))
    response = asyncio.run(api.post())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "5"
    assert api.engine.wait_until_idle()


def events_until_error(text: str) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(text.rstrip("\n").split("\n\n")[-1].removeprefix("data: "))
    return last
