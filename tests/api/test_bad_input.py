"""What a client may send wrong: the right status, and an error that names the parameter."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fakes import Script
from http_harness import USER, ApiHarness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.api.service import Limits
from daemon.errors import DeviceError, EngineStopped
from daemon.metrics import Load

MakeApi = Callable[..., ApiHarness]


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hello", **fields}]


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": message(role="wizard")}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": message(content=None)}, "messages[0].content"),
    ({"messages": message(content=5)}, "messages[0].content"),
    ({"messages": message(content=[{"type": "text"}])}, "messages[0].content[0].text"),
    (
        {"messages": message(content=[{"type": "image_url", "image_url": {"url": "x"}}])},
        "messages[0].content[0].type",
    ),
    ({"messages": message(tool_calls=[{"function": {"name": "f"}}])}, "messages[0].tool_calls"),
    ({"messages": message(function_call={"name": "f"})}, "messages[0].function_call"),
    ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"nine": 1}}, "logit_bias"),
    ({"logit_bias": {"8192": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": schema_format({"type": "integer", "minimum": 5, "maximum": 3})},
        "response_format.json_schema.schema",
    ),
    ({"response_format": schema_format({"not": {}})}, "response_format.json_schema.schema"),
    (
        {"response_format": schema_format({"type": "strin"})},
        "response_format.json_schema.schema.type",
    ),
    ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_choice": "yes"}, "guided_choice"),
    ({"grammar": "root ::= nowhere"}, "grammar"),
    ({"grammar": "start: nowhere"}, "grammar"),
    ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
    ({"thinking_budget": -2}, "thinking_budget"),
    ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": tool(name="a b")}, "tools[0].function.name"),
    ({"tools": tool() + tool()}, "tools[1]"),
    (
        {"tools": tool(strict=True, parameters={"properties": {"a": {"type": "array", "not": 3}}})},
        "tools[0].function.parameters.properties.a.not",
    ),
    (
        {
            "tools": tool(
                strict=True,
                parameters={"properties": {"a": {"uniqueItems": True, "type": "array"}}},
            )
        },
        "tools[0].function.parameters",
    ),
    ({"tools": tool(parameters=[])}, "tools[0].function.parameters"),
    ({"tools": tool(parameters={"type": "list"})}, "tools[0].function.parameters.type"),
    ({"tools": tool(parameters={"type": "string"})}, "tools[0].function.parameters.type"),
    (
        {"tools": tool(parameters={"properties": {"a": {"type": "strin"}}})},
        "tools[0].function.parameters.properties.a.type",
    ),
    (
        {"tools": tool(parameters={"properties": {"a": {"items": [{"anyOf": {}}]}}})},
        "tools[0].function.parameters.properties.a.items[0].anyOf",
    ),
    (
        {"tools": tool(parameters={"required": [1]})},
        "tools[0].function.parameters.required",
    ),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_bad_value_is_named(make_api: MakeApi, body: dict[str, Any], param: str) -> None:
    api = make_api()
    response = asyncio.run(api.post(**body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert api.engine.requests == []


async def send(api: ApiHarness, method: str, path: str, body: bytes = b"") -> Any:
    async with api.client() as client:
        return await client.request(method, path, content=body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"messages": "\xff"}', b"[1]", b"null", b"[" * 100_000]
)
def test_malformed_json(make_api: MakeApi, body: bytes) -> None:
    response = asyncio.run(send(make_api(), "POST", "/v1/chat/completions", body))
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_body_beyond_the_limit(make_api: MakeApi) -> None:
    api = make_api(limits=Limits(max_body_bytes=100))
    response = asyncio.run(send(api, "POST", "/v1/chat/completions", b" " * 101))
    assert response.status_code == 413
    assert "100 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)],
)
def test_unknown_routes_answer_in_json(
    make_api: MakeApi, method: str, path: str, status: int
) -> None:
    response = asyncio.run(send(make_api(), method, path))
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_unknown_model(make_api: MakeApi) -> None:
    response = asyncio.run(make_api().post(model="gpt-4"))
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny-coder" in error["message"]


def test_prompt_too_long_is_worded_as_agents_know_it(make_api: MakeApi) -> None:
    api = make_api(context_length=64)
    response = asyncio.run(api.post(messages=message(content="word " * 200), stream=True))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 64 tokens" in error["message"]


def test_overload_says_when_to_come_back(make_api: MakeApi) -> None:
    response = asyncio.run(make_api(max_waiting=0).post())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("error", "status"), [(DeviceError("The GPU fell off."), 500), (EngineStopped("Over."), 503)]
)
def test_engine_failure(make_api: MakeApi, error: Exception, status: int) -> None:
    tokens = make_api().service.tokenizer.encode("a b c")
    api = make_api(Script(tokens, error=error))  # type: ignore[arg-type]
    response = asyncio.run(api.post())
    assert response.status_code == status
    assert response.json()["error"]["message"] == str(error)
    streamed = asyncio.run(api.post(stream=True))
    assert streamed.status_code == 200
    last = streamed.text.rstrip("\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == str(error)
    assert api.service.metrics.snapshot().finishes == {"failed": 2}
    assert api.app.state.generations.load() == Load(0, 0)


def test_our_own_mistake_shows_no_traceback(make_api: MakeApi) -> None:
    def script(request: object) -> Script:
        raise ZeroDivisionError("secret")

    response = asyncio.run(make_api(script).post())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


@pytest.mark.parametrize("arguments", ["{broken", "[1]", "3", "", '{"a": {"b": 1}}', None])
def test_any_arguments_in_history_are_accepted(make_api: MakeApi, arguments: str | None) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "done"}]},
    ]
    api = make_api()
    assert asyncio.run(api.post(messages=history)).status_code == 200
    prompt = api.service.tokenizer.decode(api.engine.requests[0].tokens)
    assert "<function=f>" in prompt
    assert (arguments or "") in prompt or arguments == '{"a": {"b": 1}}'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "function", "name", "parameters", "items"]),
            children,
            max_size=4,
        )
    ),
    max_leaves=8,
)
KEYS = [
    *("messages", "tools", "stop", "logit_bias", "tool_choice", "chat_template_kwargs", "n"),
    *("response_format", "grammar", "json_schema", "guided_json", "guided_choice", "reasoning"),
    *("structured_outputs", "thinking", "thinking_budget"),
]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_no_body_is_a_server_error(make_api: MakeApi, body: dict[str, Any]) -> None:
    response = asyncio.run(make_api("").post(**body))
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": message(content="a") * 4}, "messages"),
        ({"tools": [one for i in range(3) for one in tool(name=f"f{i}")]}, "tools"),
    ],
)
def test_more_than_is_allowed(make_api: MakeApi, body: dict[str, Any], param: str) -> None:
    api = make_api(limits=Limits(max_messages=3, max_tools=2))
    response = asyncio.run(api.post(**body))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert api.engine.requests == []
