"""Replies of the tiny model that must have a form: it would never write them by itself."""

import json
from typing import Any, Literal

import openai
import pydantic
import pytest
from daemon_process import DaemonProcess

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "kind": {"enum": ["bug", "feature"]},
    },
    "required": ["title", "count", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "issue", "schema": SCHEMA, "strict": True}}


def function(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [
    function("read_file", {"path": {"type": "string", "maxLength": 30}}),
    function("wait", {"seconds": {"type": "integer", "minimum": 1, "maximum": 9}}, strict=True),
]


def chat(daemon: DaemonProcess, content: str = "hello", **options: Any) -> Any:
    options = {"max_tokens": 400, "temperature": 1.0, "seed": 7} | options
    return daemon.openai.chat.completions.create(
        model="tiny-coder", messages=[{"role": "user", "content": content}], **options
    )


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_schema(daemon: DaemonProcess, thinking: bool, seed: int) -> None:
    extra = {"enable_thinking": thinking, "thinking_budget": 20}
    answer = chat(daemon, response_format=FORMAT, seed=seed, extra_body=extra)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert sorted(value) == sorted(SCHEMA["required"])
    assert len(value["title"]) <= 40
    assert 1 <= value["count"] <= 9
    assert value["kind"] in ("bug", "feature")
    assert "<think>" not in choice.message.content


def test_streamed_and_beside_a_free_reply(daemon: DaemonProcess) -> None:
    with chat(daemon, response_format=FORMAT, stream=True) as stream:
        free = chat(daemon, temperature=0)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert json.loads("".join(pieces))["kind"] in ("bug", "feature")
    assert free.choices[0].message.content.startswith("Hello!")


def test_cut_off_it_says_so(daemon: DaemonProcess) -> None:
    answer = chat(
        daemon, response_format=FORMAT, max_tokens=5, extra_body={"enable_thinking": False}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_call_that_must_be(daemon: DaemonProcess, choice: str, seed: int) -> None:
    named: Any = {"type": "function", "function": {"name": "wait"}}
    answer = chat(
        daemon,
        tools=TOOLS,
        tool_choice=named if choice == "named" else choice,
        parallel_tool_calls=False,
        seed=seed,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    if choice == "named":
        assert call.function.name == "wait"
    if call.function.name == "wait":
        assert 1 <= arguments["seconds"] <= 9
    else:
        assert len(arguments["path"]) <= 30


class Step(pydantic.BaseModel):
    text: str = pydantic.Field(max_length=20)
    done: bool


class Plan(pydantic.BaseModel):
    """As the openai package sends it: strict, with definitions that refer to one another."""

    steps: list[Step] = pydantic.Field(max_length=2)
    size: Literal["small", "large"]


def test_what_the_openai_package_parses(daemon: DaemonProcess) -> None:
    completions = daemon.openai.chat.completions
    common: Any = {
        "model": "tiny-coder",
        "messages": [{"role": "user", "content": "hello"}],
        "extra_body": {"enable_thinking": False},
        "seed": 5,
        "max_tokens": 600,
    }
    plan = completions.parse(response_format=Plan, **common).choices[0].message.parsed
    assert plan is not None
    assert plan.size in ("small", "large")
    tool = openai.pydantic_function_tool(Plan)
    called = completions.parse(tools=[tool], tool_choice="required", **common).choices[0].message
    assert called.tool_calls is not None
    assert all(isinstance(c.function.parsed_arguments, Plan) for c in called.tool_calls)


def test_a_grammar_as_llama_server_takes_it(daemon: DaemonProcess) -> None:
    extra = {"grammar": 'root ::= ("yes" | "no") " " [0-9]{3}', "enable_thinking": False}
    content = chat(daemon, extra_body=extra).choices[0].message.content
    word, number = content.split(" ")
    assert word in ("yes", "no")
    assert number.isdigit()
    assert len(number) == 3


def test_a_thinking_budget(daemon: DaemonProcess) -> None:
    """The tokens that end thinking and reply are banned; `</think>` comes all the same."""
    ends = {"8180": -100, "8178": -100, "8176": -100}
    answer = chat(daemon, logit_bias=ends, max_tokens=90, extra_body={"thinking_budget": 8})
    message = answer.choices[0].message
    assert "Considering the limited time" in message.reasoning_content
    assert "think>" not in message.content
    details = answer.usage.completion_tokens_details
    assert 8 < details.reasoning_tokens < answer.usage.completion_tokens


def test_a_schema_that_cannot_be(daemon: DaemonProcess) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="not") as caught:
        chat(daemon, response_format=bad)
    assert caught.value.param == "response_format.json_schema.schema"
