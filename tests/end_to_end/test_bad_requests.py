"""What clients get wrong over HTTP: the right status, OpenAI's form, and a daemon that goes on."""

from typing import Any

import openai
import pytest
from daemon_process import DaemonProcess

USER = [{"role": "user", "content": "hello"}]


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stop": [""]}, "stop"),
        ({"seed": "lucky"}, "seed"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": tool(name="")}, "tools"),
        ({"tools": tool(name="f", parameters={"type": "no such type"})}, "tools"),
        ({"tools": tool(name="f", parameters=[])}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_a_bad_value_is_named(daemon: DaemonProcess, change: dict[str, Any], param: str) -> None:
    answer = daemon.http.post("/v1/chat/completions", json={"messages": USER, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"].startswith(param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"messages": \xff}', b"[" * 9999])
def test_a_body_that_is_no_request(daemon: DaemonProcess, body: bytes) -> None:
    answer = daemon.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(daemon: DaemonProcess, stream: bool) -> None:
    """Agents compact their history when they read this text."""
    messages = [{"role": "user", "content": "one two three " * 20_000}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 32768") as caught:
        daemon.openai.chat.completions.create(model="tiny-coder", messages=messages, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_another_model(daemon: DaemonProcess) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        daemon.openai.chat.completions.create(model="gpt-5", messages=USER)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)],
)
def test_another_route(daemon: DaemonProcess, method: str, path: str, status: int) -> None:
    answer = daemon.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_daemon_is_well_after_all_of_this(daemon: DaemonProcess) -> None:
    completion = daemon.openai.chat.completions.create(
        model="tiny-coder", messages=USER, temperature=0
    )
    assert completion.choices[0].message.content.startswith("Hello!")
    assert "Traceback" not in daemon.log()
