"""Anthropic's dialect over the wire: blocks, events, usage, and what is refused."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import Script
from http_harness import ApiHarness

from daemon.api.sealed_reasoning import seal
from daemon.api.service import Limits
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]

USER = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "read_file",
    "description": "Read a file.",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
}
CALL = (
    "<tool_call>\n<function=read_file>\n<parameter=path>\n{}\n</parameter>\n</function>\n"
    "</tool_call>"
)
THOUGHT = "Look first.\n</think>\n\n"
THINKING = {"type": "enabled", "budget_tokens": 1024}


def send(api: ApiHarness, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    async def post() -> httpx.Response:
        async with api.client() as client:
            full = {"messages": USER, "max_tokens": 100, **body}
            headers = {"anthropic-version": "2023-06-01"}
            return await client.post(path, json=full, headers=headers)

    return asyncio.run(post())


def whole(api: ApiHarness, **body: Any) -> dict[str, Any]:
    response = send(api, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(api: ApiHarness, **body: Any) -> list[dict[str, Any]]:
    response = send(api, stream=True, **body)
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def prompt_of(api: ApiHarness, index: int = 0) -> str:
    return api.service.tokenizer.decode(api.engine.requests[index].tokens)


def test_whole_answer(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(THOUGHT + "Hello!")
    answer = whole(api, thinking=THINKING)
    num_prompt = len(api.engine.requests[0].tokens)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny-coder",
        "content": [
            {"type": "thinking", "thinking": "Look first.", "signature": seal("Look first.")},
            {"type": "text", "text": "Hello!", "citations": None},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt - 5,
            "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 3,
            "output_tokens": len(tokenizer.encode(THOUGHT + "Hello!")),
            "output_tokens_details": {
                "thinking_tokens": len(tokenizer.encode("Look first.\n</think>"))
            },
            "service_tier": "standard",
        },
    }


def test_stream_in_order(make_api: MakeApi) -> None:
    api = make_api(THOUGHT + "I read.\n\n" + CALL.format("a.py") + "\n" + CALL.format("b.py"))
    events = streamed(api, thinking=THINKING, tools=[TOOL])
    blocks = [event for event in events if event["type"].startswith("content_block")]
    kinds = [event["type"].removeprefix("content_block_") for event in blocks]
    assert [kind for kind in kinds if kind != "delta"] == ["start", "stop"] * 4
    starts = [event for event in blocks if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2, 3]
    types = [event["content_block"]["type"] for event in starts]
    assert types == ["thinking", "text", "tool_use", "tool_use"]
    deltas = [event["delta"] for event in blocks if "delta" in event]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Look first."
    assert "".join(delta.get("text", "") for delta in deltas) == "I read."
    [signature] = [delta["signature"] for delta in deltas if delta["type"] == "signature_delta"]
    assert signature == seal("Look first.")
    arguments = [delta["partial_json"] for delta in deltas if "partial_json" in delta]
    assert arguments == ['{"path": "a.py"}', '{"path": "b.py"}']
    assert len({event["content_block"]["id"] for event in starts[2:]}) == 2


def test_stream_tells_the_cost_at_both_ends(make_api: MakeApi) -> None:
    api = make_api("Hi")
    first, *_, closing, last = streamed(api)
    num_prompt = len(api.engine.requests[0].tokens)
    usage = first["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (num_prompt - 3, 3)
    usage = closing["usage"]
    parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert [usage[part] for part in parts] == [num_prompt - 5, 3, 2]
    assert closing["delta"]["stop_reason"] == "end_turn"
    assert last == {"type": "message_stop"}


@pytest.mark.parametrize(
    ("reply", "body", "reason", "stop"),
    [
        ("one two three", {"stop_sequences": ["two"]}, "stop_sequence", "two"),
        ("one two three four five", {"max_tokens": 2}, "max_tokens", None),
        (CALL.format("a"), {"tools": [TOOL]}, "tool_use", None),
    ],
)
def test_why_it_ended(
    make_api: MakeApi, reply: str, body: dict[str, Any], reason: str, stop: str | None
) -> None:
    answer = whole(make_api(reply), **body)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, stop)
    [closing] = [e for e in streamed(make_api(reply), **body) if e["type"] == "message_delta"]
    assert (closing["delta"]["stop_reason"], closing["delta"]["stop_sequence"]) == (reason, stop)


def test_thinking_that_is_not_shown_comes_back_by_its_signature(make_api: MakeApi) -> None:
    api = make_api(THOUGHT + CALL.format("a.py"))
    hidden = {"type": "adaptive", "display": "omitted"}
    answer = whole(api, thinking=hidden, tools=[TOOL])
    assert answer["content"][0] == {
        "type": "thinking",
        "thinking": "",
        "signature": seal("Look first."),
    }
    events = streamed(api, thinking=hidden, tools=[TOOL])
    assert not any("thinking" in event.get("delta", {}) for event in events)
    call = answer["content"][1]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "x = 1"}
    history = [
        *USER,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result]},
    ]
    whole(api, messages=history, thinking=hidden, tools=[TOOL])
    first, _, third = api.engine.requests
    reply = api.service.tokenizer.encode(THOUGHT + CALL.format("a.py"))
    assert third.tokens[: len(first.tokens) + len(reply)] == (*first.tokens, *reply)


def test_no_thinking_unless_asked(make_api: MakeApi) -> None:
    api = make_api("Plain.")
    assert whole(api)["content"] == [{"type": "text", "text": "Plain.", "citations": None}]
    assert prompt_of(api).endswith("</think>\n\n")


def test_the_whole_conversation_is_shown(make_api: MakeApi) -> None:
    api = make_api()
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: version=1;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "system", "content": "The date has changed."},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": True,
                    "content": "no",
                },
                {"type": "text", "text": "two"},
                {"type": "text", "text": "three"},
            ],
        },
    ]
    whole(api, system=system, messages=messages, tools=[TOOL])
    prompt = prompt_of(api)
    assert "billing" not in prompt
    assert "Be brief.\n\nBe kind." in prompt
    order = [
        "Be kind.",
        "What is it?",
        "The date has changed.",
        "I look.",
        "Error: no",
        "two\n\nthree",
    ]
    places = [prompt.index(text) for text in order]
    assert places == sorted(places)


def test_marks_become_boundaries(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api()
    mark = {"cache_control": {"type": "ephemeral"}}
    system = [
        {"type": "text", "text": "Be brief. " * 20, **mark},
        {"type": "text", "text": "Kind."},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t", "content": "x " * 30, **mark},
        {"type": "tool_result", "tool_use_id": "u", "content": "y"},
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one", **mark}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": results},
    ]
    whole(api, system=system, messages=messages, tools=[{**TOOL, **mark}])
    [request] = api.engine.requests
    marks = [b.position for b in request.boundaries if b.reason == "mark"]
    before = [tokenizer.decode(request.tokens[:position]) for position in marks]
    assert len(marks) == 4
    tools_end, system_end, user_end, result_end = before
    assert tools_end.rstrip().endswith(("</IMPORTANT>", "</tools>")) or "Be brief" not in tools_end
    assert system_end.rstrip(" ").endswith(("Be brief", "Be brief."))
    assert user_end.endswith("one<|im_end|>\n")
    assert result_end.rstrip(" ").endswith("x")
    assert "y" not in result_end.rpartition("<tool_response>")[2]


def test_deferred_tools_appear_when_referred_to(make_api: MakeApi) -> None:
    api = make_api(CALL.format("a.py"))
    tools = [{**TOOL, "name": "search"}, {**TOOL, "defer_loading": True}]
    whole(api, tools=tools)
    assert "read_file" not in prompt_of(api)
    found = {"type": "tool_reference", "tool_name": "read_file"}
    messages = [
        *USER,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "search"}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t", "content": [found]}],
        },
    ]
    answer = whole(api, tools=tools, messages=messages)
    assert "read_file" in prompt_of(api, 1).rpartition("<tool_response>")[2]
    assert answer["content"][0]["input"] == {"path": "a.py"}


def test_tools_of_the_provider_are_passed_over_and_named(make_api: MakeApi) -> None:
    api = make_api()
    response = send(api, tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}])
    assert response.status_code == 200
    assert response.headers["x-qwend-ignored"] == "tools[1] (web_search_20250305)"
    assert "web_search" not in prompt_of(api)


def test_count_tokens_is_the_length_of_the_prompt(make_api: MakeApi) -> None:
    api = make_api()
    whole(api, system="Be brief.", tools=[TOOL])
    response = send(api, "/v1/messages/count_tokens", system="Be brief.", tools=[TOOL])
    assert response.json() == {"input_tokens": len(api.engine.requests[0].tokens)}
    assert len(api.engine.requests) == 1


def test_pings_during_a_long_prompt(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    script = Script(tokenizer.encode("Hi"), prefill_steps=40, step_s=0.005)
    events = streamed(make_api(script, limits=Limits(sign_of_life_s=0.02)))
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds.count("ping") >= 3


IMAGE = {"type": "image", "source": {"type": "base64", "data": "", "media_type": "image/png"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    ({"messages": [*USER, {"role": "assistant", "content": "I"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "content[0].type"),
    ({"system": [IMAGE]}, "system[0].type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [TOOL]}, "tool_choice"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"tools": [TOOL, TOOL]}, "tools[1]"),
    ({"tools": [{"name": "f", "input_schema": {"type": "list"}}]}, "tools[0].input_schema.type"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"temperature": 3}, "temperature"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type"),
]


@pytest.mark.parametrize(("body", "named"), BAD, ids=[json.dumps(body)[:50] for body, _ in BAD])
def test_bad_values_are_named_in_anthropics_words(
    make_api: MakeApi, body: dict[str, Any], named: str
) -> None:
    response = send(make_api(), **body)
    assert response.status_code == 400, response.text
    answer = response.json()
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert named in answer["error"]["message"]


def test_overflow_is_worded_as_agents_know_it(make_api: MakeApi) -> None:
    long = [{"role": "user", "content": "word " * 200}]
    response = send(make_api(context_length=64), messages=long, stream=True)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("prompt is too long: ")
    assert message.endswith("> 64 maximum")


def test_other_errors_in_anthropics_words(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    busy = send(make_api(max_waiting=0))
    assert (busy.status_code, busy.json()["error"]["type"]) == (529, "overloaded_error")
    assert busy.headers["retry-after"] == "7"
    unknown = send(make_api(), model="claude-9")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")

    from daemon.errors import DeviceError

    failing = Script(tokenizer.encode("a b"), error=DeviceError("The GPU fell off."))
    last = streamed(make_api(failing))[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "The GPU fell off."}}


def test_diagnostics_say_why_it_missed(make_api: MakeApi) -> None:
    first = whole(make_api("Hi"), diagnostics={"previous_message_id": None})["diagnostics"]
    assert first == {"cache_miss_reason": None}
    lost = whole(make_api("Hi"), diagnostics={"previous_message_id": "msg_gone"})["diagnostics"]
    assert lost["cache_miss_reason"]["type"] == "previous_message_not_found"
    closing = streamed(make_api("Hi"), diagnostics={})[-2]
    assert "cache_miss_reason" in closing["diagnostics"]
    assert "diagnostics" not in whole(make_api("Hi"))


SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
FORM = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize(
    "asked",
    [
        {"output_config": {"format": FORM}},
        {"output_format": FORM},
        {"tool_choice": {"type": "any"}, "tools": [TOOL]},
        {"tool_choice": {"type": "tool", "name": "read_file"}, "tools": [TOOL]},
        {"tools": [{**TOOL, "strict": True}]},
        {"thinking": THINKING},
    ],
)
def test_forms_and_budgets_reach_the_engine(make_api: MakeApi, asked: dict[str, Any]) -> None:
    forced = "tool_choice" in asked
    api = make_api(CALL.format("a.py") if forced else '{"title": "x"}')
    answer = whole(api, **asked)
    assert (answer["content"][-1]["type"] == "tool_use") == forced
    assert api.engine.requests[0].constraint is not None


def test_an_agents_reminder_does_not_end_the_loop(make_api: MakeApi) -> None:
    api = make_api(THOUGHT + "Done.")
    call = {"type": "tool_use", "id": "t", "name": "read_file", "input": {"path": "a"}}
    thought = {"type": "thinking", "thinking": "I look.", "signature": ""}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "x = 1"}
    reminder = {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"}
    messages = [
        *USER,
        {"role": "assistant", "content": [thought, call]},
        {"role": "user", "content": [result, reminder, {"type": "text", "text": "And now?"}]},
    ]
    whole(api, messages=messages[:2] + [{"role": "user", "content": [result, reminder]}])
    whole(api, messages=messages)
    looping, asked_again = prompt_of(api, 0), prompt_of(api, 1)
    assert "I look." in looping
    response = looping.rpartition("<tool_response>")[2].partition("</tool_response>")[0]
    assert "x = 1" in response
    assert "Be brief." in response
    assert asked_again.rpartition("</tool_response>")[2].count("And now?") == 1


def test_a_prompt_may_be_kept_without_an_answer(make_api: MakeApi) -> None:
    api = make_api("Hi")
    answer = whole(api, max_tokens=0)
    assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
    assert api.engine.requests[0].max_tokens == 0
    kinds = [event["type"] for event in streamed(api, max_tokens=0)]
    assert kinds == ["message_start", "message_delta", "message_stop"]
