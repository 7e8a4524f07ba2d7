"""OpenAI's responses dialect over the wire: items, events, history, what is stored and refused."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import Script
from http_harness import ApiHarness

from daemon.api.openai_responses_store import ResponseStore, StoredResponse
from daemon.api.sealed_reasoning import seal, unseal
from daemon.api.service import Limits
from daemon.errors import DeviceError
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]

READ_FILE = {
    "type": "function",
    "name": "read_file",
    "description": "Read a file.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
}
CALL = "<tool_call>\n<function={}>\n<parameter={}>\n{}\n</parameter>\n</function>\n</tool_call>"
READ = CALL.format("read_file", "path", "a.py")
THOUGHT = "Look first.\n</think>\n\n"
ENCRYPTED = {"include": ["reasoning.encrypted_content"]}


def send(api: ApiHarness, method: str, path: str, body: Any = None) -> httpx.Response:
    async def request() -> httpx.Response:
        async with api.client() as client:
            return await client.request(method, path, json=body)

    return asyncio.run(request())


def post(api: ApiHarness, **body: Any) -> httpx.Response:
    return send(api, "POST", "/v1/responses", {"input": "hello", **body})


def whole(api: ApiHarness, **body: Any) -> dict[str, Any]:
    response = post(api, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(api: ApiHarness, **body: Any) -> list[dict[str, Any]]:
    response = post(api, stream=True, **body)
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def prompt_of(api: ApiHarness, index: int = -1) -> str:
    return api.service.tokenizer.decode(api.engine.requests[index].tokens)


def test_whole_answer(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(THOUGHT + "Hello!")
    answer = whole(api, metadata={"a": "b"}, instructions="Be brief.")
    reasoning, message = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Look first."}]
    assert reasoning["summary"] == []
    assert "encrypted_content" not in reasoning
    assert (message["role"], message["status"]) == ("assistant", "completed")
    [part] = message["content"]
    assert (part["type"], part["text"], part["annotations"]) == ("output_text", "Hello!", [])
    num_prompt = len(api.engine.requests[0].tokens)
    num_reply = len(tokenizer.encode(THOUGHT + "Hello!"))
    assert answer["usage"] == {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        "output_tokens": num_reply,
        "output_tokens_details": {
            "reasoning_tokens": len(tokenizer.encode("Look first.\n</think>"))
        },
        "total_tokens": num_prompt + num_reply,
    }
    expected = {"status": "completed", "object": "response", "model": "tiny-coder", "error": None}
    assert answer.items() >= {**expected, "metadata": {"a": "b"}, "store": True}.items()


def test_stream_in_order(make_api: MakeApi) -> None:
    api = make_api(THOUGHT + "I read.\n\n" + READ)
    events = streamed(api, tools=[READ_FILE], reasoning={"summary": "auto"}, **ENCRYPTED)
    kinds = [event["type"].removeprefix("response.") for event in events]
    once = [kind for at, kind in enumerate(kinds) if kind != kinds[at - 1]]
    assert once == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert unseal(done[0]["encrypted_content"]) == "Look first."
    assert done[2]["arguments"] == '{"path": "a.py"}'
    texts = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(texts) == "I read."
    assert len({item["id"] for item in done}) == 3


def test_a_reply_that_comes_back_as_items_keeps_its_tokens(
    make_api: MakeApi, tokenizer: Tokenizer
) -> None:
    api = make_api(THOUGHT + READ)
    asked = {"tools": [READ_FILE], "reasoning": {"summary": "auto"}, "store": False, **ENCRYPTED}
    output = whole(api, **asked)["output"]
    output[0]["summary"] = [{"type": "summary_text", "text": "Shortened."}]
    result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "x = 1"}
    user = {"role": "user", "content": [{"type": "input_text", "text": "hello"}]}
    whole(api, input=[user, *output, result], **asked)
    first, second = api.engine.requests
    reply = tokenizer.encode(THOUGHT + READ)
    assert second.tokens[: len(first.tokens) + len(reply)] == (*first.tokens, *reply)
    assert "x = 1" in prompt_of(api)


def test_going_on_from_a_stored_response(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(THOUGHT + READ)
    first = whole(api, tools=[READ_FILE])
    result = {
        "type": "function_call_output",
        "call_id": first["output"][1]["call_id"],
        "output": [{"type": "input_text", "text": "x = 1"}],
    }
    second = whole(
        api, input=[result], previous_response_id=first["id"], tools=[READ_FILE], store=False
    )
    before, after = api.engine.requests
    reply = tokenizer.encode(THOUGHT + READ)
    assert after.tokens[: len(before.tokens) + len(reply)] == (*before.tokens, *reply)
    lost = post(api, previous_response_id=second["id"])
    assert (lost.status_code, lost.json()["error"]["param"]) == (400, "previous_response_id")


def test_instructions_hold_for_one_response(make_api: MakeApi) -> None:
    api = make_api("Hi")
    first = whole(api, instructions="Speak French.")
    whole(api, previous_response_id=first["id"], input="again")
    assert "French" in prompt_of(api, 0)
    assert "French" not in prompt_of(api, 1)


def test_fetch_and_delete(make_api: MakeApi) -> None:
    api = make_api("Hi")
    answer = whole(api)
    path = f"/v1/responses/{answer['id']}"
    assert send(api, "GET", path).json() == answer
    assert send(api, "GET", path + "?stream=true").status_code == 400
    gone = {"id": answer["id"], "object": "response", "deleted": True}
    assert send(api, "DELETE", path).json() == gone
    assert send(api, "GET", path).status_code == 404
    assert send(api, "DELETE", path).status_code == 404
    unkept = whole(api, store=False)
    assert send(api, "GET", f"/v1/responses/{unkept['id']}").status_code == 404


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_responses=2, max_bytes=100)
    for name in "abc":
        store.keep(name, StoredResponse(b"", (), 10))
        assert store.find("a" if name != "c" else "c")
    assert store.find("b") is None
    store.keep("d", StoredResponse(b"", (), 95))
    assert [name for name in "abcd" if store.find(name)] == ["d"]


def test_system_and_developer_items_stay_in_place(make_api: MakeApi) -> None:
    api = make_api("Hi")
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "AA"}]},
        {"type": "message", "role": "developer", "content": "BB"},
        {"role": "user", "content": "CC"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "DD"}]},
        {"role": "system", "content": "EE"},
        {"role": "user", "content": "FF"},
    ]
    whole(api, input=items)
    prompt = prompt_of(api)
    places = [prompt.index(text) for text in ("AA", "BB", "CC", "DD", "EE", "FF")]
    assert places == sorted(places)


NAMESPACE = {"type": "namespace", "name": "agents", "tools": [{**READ_FILE, "name": "spawn"}]}
PATCH = {"type": "custom", "name": "patch", "format": {"type": "grammar", "definition": "begin"}}


def test_tools_of_a_namespace_keep_it(make_api: MakeApi) -> None:
    api = make_api(CALL.format("spawn", "path", "x"))
    output = whole(api, tools=[READ_FILE, NAMESPACE])["output"]
    assert (output[-1]["name"], output[-1]["namespace"]) == ("spawn", "agents")
    user = {"role": "user", "content": "hello"}
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "ok"}
    whole(api, input=[user, *output, result], tools=[READ_FILE, NAMESPACE])
    assert "<function=spawn>" in prompt_of(api)


def test_a_name_in_two_namespaces_is_qualified(make_api: MakeApi) -> None:
    other = {"type": "namespace", "name": "others", "tools": NAMESPACE["tools"]}
    api = make_api(CALL.format("others.spawn", "path", "x"))
    [call] = whole(api, tools=[NAMESPACE, other])["output"][-1:]
    assert (call["name"], call["namespace"]) == ("spawn", "others")


def test_custom_tools_take_free_text(make_api: MakeApi) -> None:
    api = make_api(CALL.format("patch", "input", "begin\nend"))
    events = streamed(api, tools=[PATCH])
    [call] = events[-1]["response"]["output"]
    assert (call["type"], call["name"], call["input"]) == (
        "custom_tool_call",
        "patch",
        "begin\nend",
    )
    assert "response.custom_tool_call_input.done" in [event["type"] for event in events]
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "done"}
    whole(api, input=[{"role": "user", "content": "hello"}, call, result], tools=[PATCH])
    assert "<parameter=input>\nbegin\nend\n</parameter>" in prompt_of(api)


def test_what_the_provider_would_run_is_passed_over_and_named(make_api: MakeApi) -> None:
    items = [{"type": "web_search_call", "id": "ws"}, {"role": "user", "content": "hello"}]
    response = post(make_api("Hi"), input=items, tools=[{"type": "web_search"}], wizardry=1)
    assert response.status_code == 200
    named = response.headers["x-qwend-ignored"]
    assert named == "wizardry, tools[0] (web_search), input[0] (web_search_call)"


def test_a_reply_cut_short_is_incomplete(make_api: MakeApi) -> None:
    answer = whole(make_api("one two three four"), max_output_tokens=2)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][-1]["status"] == "incomplete"
    events = streamed(make_api("one two three four"), max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"


def test_signs_of_life_are_states(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    script = Script(tokenizer.encode("Hi"), prefill_steps=40, step_s=0.005)
    events = streamed(make_api(script, limits=Limits(sign_of_life_s=0.02)))
    kinds = [event["type"] for event in events]
    assert kinds.count("response.in_progress") >= 3


def test_a_broken_stream_ends_as_failed(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    script = Script(tokenizer.encode("a b"), error=DeviceError("The GPU fell off."))
    last = streamed(make_api(script))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The GPU fell off."}


def test_overflow_is_worded_as_agents_know_it(make_api: MakeApi) -> None:
    response = post(make_api(context_length=64), input="word " * 200, stream=True)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length" in error["message"]


def test_input_tokens_are_counted(make_api: MakeApi) -> None:
    api = make_api("Hi")
    whole(api, tools=[READ_FILE])
    counted = send(
        api, "POST", "/v1/responses/input_tokens", {"input": "hello", "tools": [READ_FILE]}
    )
    num_prompt = len(api.engine.requests[0].tokens)
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": num_prompt}


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": 3}, "input"),
    ({"input": [IMAGE]}, "input[0].content[0].type"),
    ({"input": [{"type": "wizard"}]}, "input[0].type"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
    ({"input": [{"role": "user", "content": [{"type": "text"}]}]}, "input[0].content[0].text"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"truncation": "auto"}, "truncation"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "wizard"}}}, "text.format.type"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"tools": [READ_FILE, READ_FILE]}, "tools[1]"),
    ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
    ({"previous_response_id": "resp_0"}, "previous_response_id"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=[json.dumps(body)[:50] for body, _ in BAD])
def test_bad_values_are_named(make_api: MakeApi, body: dict[str, Any], param: str) -> None:
    response = post(make_api(), **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("text", ["", "Think.", "ünï\nçødé", "x" * 100_000])
def test_sealed_reasoning_comes_back(text: str) -> None:
    assert unseal(seal(text)) == text
    assert unseal(seal(text)[:-1]) is None or not text
    assert unseal(seal(text + "x").replace("qwend1", "qwend2")) is None


@pytest.mark.parametrize(
    "sealed", [None, "", "ENCabc", "qwend1.", "qwend1.!!!!", "qwend1.0.AAAA", "qwend1.é.é"]
)
def test_foreign_seals_are_no_text(sealed: str | None) -> None:
    assert unseal(sealed) is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "asked",
    [
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
        {"text": {"format": {"type": "json_object"}}},
        {"tool_choice": "required", "tools": [READ_FILE]},
        {"tool_choice": {"type": "function", "name": "read_file"}, "tools": [READ_FILE]},
        {"tool_choice": {"type": "custom", "name": "patch"}, "tools": [PATCH]},
        {"tools": [{**READ_FILE, "strict": True}]},
    ],
)
def test_forms_reach_the_engine(make_api: MakeApi, asked: dict[str, Any]) -> None:
    call = CALL.format("patch", "input", "x") if PATCH in asked.get("tools", []) else READ
    reply = call if "tool_choice" in asked else '{"a": 1}'
    api = make_api("</think>\n\n" + reply)
    answer = whole(api, **asked)
    assert api.engine.requests[0].constraint is not None
    if "text" in asked:
        assert answer["text"] == asked["text"]
