"""The chat endpoint, in process: shapes, usage, finish reasons, streams, what is remembered."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fakes import Script
from http_harness import ApiHarness, events

from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]

READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
CALL = (
    "<tool_call>\n<function=read_file>\n<parameter=path>\n{}\n</parameter>\n</function>\n"
    "</tool_call>"
)
THOUGHT = "Look first.\n</think>\n\n"


def post(api: ApiHarness, **body: Any) -> dict[str, Any]:
    response = asyncio.run(api.post(**body))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(api: ApiHarness, **body: Any) -> list[dict[str, Any]]:
    response = asyncio.run(api.post(stream=True, **body))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


def joined(chunks: list[dict[str, Any]], key: str) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(key) or "" for delta in deltas)


def test_whole_answer(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(THOUGHT + "Hello!")
    answer = post(api, model="tiny-coder")
    num_prompt = len(api.engine.requests[0].tokens)
    num_reply = len(tokenizer.encode(THOUGHT + "Hello!"))
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "tiny-coder",
        "system_fingerprint": "qwend",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello!",
                    "refusal": None,
                    "reasoning_content": "Look first.",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_reply,
            "total_tokens": num_prompt + num_reply,
            "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
            "completion_tokens_details": {
                "reasoning_tokens": len(tokenizer.encode("Look first.\n</think>"))
            },
        },
        "timings": {
            "cache_n": 3,
            "prompt_n": num_prompt - 3,
            "prompt_ms": 12.0,
            "prompt_per_token_ms": round(12 / (num_prompt - 3), 4),
            "prompt_per_second": round((num_prompt - 3) / 0.012, 3),
            "predicted_n": num_reply,
            "predicted_ms": 34.0,
            "predicted_per_token_ms": round(34 / num_reply, 4),
            "predicted_per_second": round(num_reply / 0.034, 3),
        },
    }


def test_stream_has_the_same_answer(make_api: MakeApi) -> None:
    api = make_api(THOUGHT + "Hello!")
    chunks = stream(api)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks, "reasoning_content") == "Look first."
    assert joined(chunks, "content") == "Hello!"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_stream_ends_with_usage_if_asked(make_api: MakeApi) -> None:
    chunks = stream(make_api("x</think>\n\ny"), stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    details = chunks[-1]["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 3, "cache_write_tokens": 2}
    assert chunks[-2]["timings"]["cache_n"] == 3


def test_progress_of_the_prompt_if_asked(make_api: MakeApi) -> None:
    api = make_api(Script(api_tokens(make_api, "</think>\n\nx"), prefill_steps=3, num_cached=2))
    chunks = stream(api, return_progress=True)
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    num_prompt = len(api.engine.requests[0].tokens)
    assert {(step["total"], step["cache"]) for step in progress} == {(num_prompt, 2)}
    done = [step["processed"] for step in progress]
    assert done == sorted(done)
    assert done[-1] == num_prompt
    assert not any("prompt_progress" in chunk for chunk in stream(api))


def test_tool_calls(make_api: MakeApi) -> None:
    reply = THOUGHT + "I read.\n\n" + CALL.format("a.py") + "\n" + CALL.format("b.py")
    choice = post(make_api(reply), tools=[READ_FILE])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I read."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "read_file", "arguments": '{"path": "a.py"}'},
        {"name": "read_file", "arguments": '{"path": "b.py"}'},
    ]
    assert {call["type"] for call in calls} == {"function"}
    assert len({call["id"] for call in calls}) == 2


def test_streamed_tool_calls_carry_an_index(make_api: MakeApi) -> None:
    reply = THOUGHT + CALL.format("a.py") + "\n" + CALL.format("b.py")
    chunks = stream(make_api(reply), tools=[READ_FILE])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_parallel_tool_calls_false_ends_after_the_first(make_api: MakeApi) -> None:
    reply = THOUGHT + CALL.format("a.py") + "\n" + CALL.format("b.py") + "\nmore" * 50
    api = make_api(Script(api_tokens(make_api, reply), step_s=0.001))
    choice = post(api, tools=[READ_FILE], parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert api.engine.cancelled == [api.engine.requests[0].id]


def api_tokens(make_api: MakeApi, text: str) -> list[int]:
    return make_api().service.tokenizer.encode(text)


def test_tool_choice_none_keeps_the_prompt_and_bans_the_call(
    make_api: MakeApi, tokenizer: Tokenizer
) -> None:
    api = make_api()
    post(api, tools=[READ_FILE])
    post(api, tools=[READ_FILE], tool_choice="none")
    free, banned = api.engine.requests
    assert free.tokens == banned.tokens
    assert free.sampling.logit_bias == ()
    [(token, bias)] = banned.sampling.logit_bias
    assert tokenizer.decode([token]) == "<tool_call>"
    assert bias <= -1000


def test_length_ends_an_answer(make_api: MakeApi) -> None:
    choice = post(make_api("a\n</think>\n\nb c d e f g"), max_tokens=2)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""


def test_too_large_max_tokens_is_capped(make_api: MakeApi) -> None:
    api = make_api(context_length=500)
    post(api, max_completion_tokens=64_000)
    [request] = api.engine.requests
    assert request.max_tokens == 500 - len(request.tokens)


def test_stop_string_ends_the_content(make_api: MakeApi) -> None:
    reply = "one STOP two\n</think>\n\nfirst ST second STOP third" + " more" * 50
    api = make_api(Script(api_tokens(make_api, reply), step_s=0.001))
    choice = post(api, stop=["STOP", "never"])["choices"][0]
    assert choice["message"]["reasoning_content"] == "one STOP two"
    assert choice["message"]["content"] == "first ST second "
    assert choice["finish_reason"] == "stop"
    assert len(api.engine.cancelled) == 1
    whole, bare = (text for text in api.replies.entries if text.startswith("<|im_start|>"))
    assert whole.endswith("</think>\n\nfirst ST second <|im_end|>\n"), "as the client was shown it"
    assert bare == "<|im_start|>assistant\nfirst ST second <|im_end|>\n"


def test_logprobs_of_every_token(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    text = "x\n</think>\n\nHi \u4f60"
    for streamed in (False, True):
        api = make_api(text)
        if streamed:
            chunks = stream(api, logprobs=True, top_logprobs=2)
            blocks = [c["choices"][0]["logprobs"] for c in chunks]
            content = [token for block in blocks if block for token in block["content"]]
        else:
            content = post(api, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
        spelled = b"".join(bytes(token["bytes"]) for token in content)
        assert spelled.decode() == text
        assert len(content) == len(tokenizer.encode(text))
        assert content[0]["logprob"] == -0.25
        assert [a["logprob"] for a in content[0]["top_logprobs"]] == [-0.25, -1.25]


def test_sampling_overrides_the_models_defaults_one_by_one(make_api: MakeApi) -> None:
    api = make_api()
    post(api, temperature=0, logit_bias={"5": -3}, seed=-1, top_k=-1, presence_penalty=1.5)
    sampling = api.engine.requests[0].sampling
    assert sampling.temperature == 0
    assert sampling.top_p == 0.95
    assert sampling.top_k == 0
    assert sampling.presence_penalty == 1.5
    assert sampling.logit_bias == ((5, -3.0),)
    assert sampling.seed == 2**63 - 1


def test_thinking_can_be_switched_off_in_three_ways(make_api: MakeApi) -> None:
    api = make_api("Plain.")
    for body in (
        {"reasoning_effort": "none"},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
    ):
        answer = post(api, **body)
        assert answer["choices"][0]["message"]["content"] == "Plain."
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_reply_that_comes_back_keeps_its_tokens(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    split = [*tokenizer.encode("Think.\n</think>\n\nHe"), *tokenizer.encode("llo")]
    assert split != tokenizer.encode("Think.\n</think>\n\nHello")
    api = make_api(Script(split))
    answer = post(api)["choices"][0]["message"]
    history = [{"role": "user", "content": "hello"}, answer]
    post(api, messages=[*history, {"role": "tool", "tool_call_id": "c", "content": "x"}])
    first, second = api.engine.requests
    assert second.tokens[: len(first.tokens) + len(split)] == (*first.tokens, *split)


def test_unknown_keys_are_accepted_and_named(make_api: MakeApi) -> None:
    api = make_api()
    response = asyncio.run(api.post(colour="blue", store=False, user="me", guided_json=None))
    assert response.status_code == 200
    assert response.headers["x-qwend-ignored"] == "colour"


def test_an_alias_is_accepted(make_api: MakeApi) -> None:
    assert post(make_api(), model="Qwen3.5-local")["model"] == "tiny-coder"


def test_boundaries_reach_the_engine(make_api: MakeApi) -> None:
    api = make_api()
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    post(api, messages=messages)
    boundaries = api.engine.requests[0].boundaries
    assert [boundary.reason for boundary in boundaries] == ["system", "prompt"]


@pytest.mark.parametrize("mark", ["prompt_cache_breakpoint", "cache_control"])
def test_marks_reach_the_engine(make_api: MakeApi, mark: str) -> None:
    api = make_api()
    parts = [{"type": "text", "text": "word " * 40, mark: {}}, {"type": "text", "text": "more"}]
    post(api, messages=[{"role": "user", "content": parts}])
    [request] = api.engine.requests
    [position] = [b.position for b in request.boundaries if b.reason == "mark"]
    before = api.service.tokenizer.decode(request.tokens[:position])
    assert before.count("word") >= 39
    assert "more" not in before


def test_sessions_by_hint_and_by_beginning(make_api: MakeApi) -> None:
    api = make_api()
    post(api, prompt_cache_key="mine")
    post(api)
    more = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi"}]
    post(api, messages=[*more, {"role": "user", "content": "and now?"}])
    post(api, messages=[{"role": "user", "content": "another"}])
    hinted, first, second, other = (request.session for request in api.engine.requests)
    assert hinted == "mine"
    assert first == second != other


def test_sessions_by_header_and_a_request_id(make_api: MakeApi) -> None:
    api = make_api()

    async def send() -> str:
        async with api.client() as client:
            body = {"messages": [{"role": "user", "content": "hello"}]}
            headers = {"X-Session-Affinity": "second", "X-Session-Id": "first"}
            response = await client.post("/v1/chat/completions", json=body, headers=headers)
            return str(response.headers["x-request-id"])

    request_id = asyncio.run(send())
    [request] = api.engine.requests
    assert (request.session, request.id) == ("first", request_id)


def test_a_rich_schema_is_accepted_as_it_is(make_api: MakeApi) -> None:
    parameters = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "edits": {
                "type": "array",
                "items": {"$ref": "#/$defs/edit"},
                "default": None,
            },
            "mode": {"enum": ["a", 1, None], "description": "How."},
            "either": {"anyOf": [{"type": ["string", "null"]}, {"const": 3}]},
            "anything": {},
        },
        "required": ["edits"],
        "additionalProperties": False,
        "$defs": {"edit": {"type": "object", "properties": {"type": {"type": "string"}}}},
    }
    bare = {"type": "function", "function": {"name": "mcp__x.y-z", "description": "No schema."}}
    rich = {"type": "function", "function": {"name": "edit", "parameters": parameters}}
    api = make_api()
    post(api, tools=[rich, bare])
    prompt = api.service.tokenizer.decode(api.engine.requests[0].tokens)
    assert '"$ref": "#/$defs/edit"' in prompt
    assert "mcp__x.y-z" in prompt


def test_a_call_that_comes_back_in_another_order_keeps_its_tokens(
    make_api: MakeApi, tokenizer: Tokenizer
) -> None:
    call = (
        "<tool_call>\n<function=edit>\n<parameter=path>\na.py\n</parameter>\n"
        "<parameter=new>\nx\n</parameter>\n</function>\n</tool_call>"
    )
    api = make_api(THOUGHT + call)
    answer = post(api)["choices"][0]["message"]
    answer["tool_calls"][0]["function"]["arguments"] = '{"new":"x","path":"a.py"}'
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "done"}
    post(api, messages=[{"role": "user", "content": "hello"}, answer, result])
    first, second = api.engine.requests
    reply = tokenizer.encode(THOUGHT + call)
    assert second.tokens[: len(first.tokens) + len(reply)] == (*first.tokens, *reply)
