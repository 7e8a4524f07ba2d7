"""OpenAI's dialect of plain text: prompts of every form, gaps, several choices, echo, logprobs."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fakes import Script
from http_harness import ApiHarness, events

from daemon.engine.requests import GenerationRequest
from daemon.errors import DeviceError
from daemon.metrics import Load
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]


def post(api: ApiHarness, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with api.client() as client:
            return await client.post("/v1/completions", json={"prompt": "def f(", **body})

    return asyncio.run(send())


def whole(api: ApiHarness, **body: Any) -> dict[str, Any]:
    response = post(api, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def prompt_of(api: ApiHarness, index: int = 0) -> str:
    return api.service.tokenizer.decode(api.engine.requests[index].tokens)


def test_whole_answer(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api("x): return x")
    answer = whole(api)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    choice = {"text": "x): return x", "index": 0, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    assert prompt_of(api) == "def f("
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode("def f("))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


def test_the_text_is_given_as_it_is(make_api: MakeApi) -> None:
    text = "<think>\na\n</think>\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>"
    assert whole(make_api(text), max_tokens=-1)["choices"][0]["text"] == text


def test_sixteen_tokens_unless_asked_for_more(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    script = Script(tokenizer.encode(" a"), endless=True)
    answer = whole(make_api(script))
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stream(make_api: MakeApi) -> None:
    api = make_api("x): return x")
    response = post(api, stream=True, echo=True, stream_options={"include_usage": True})
    chunks = events(response.text)
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "def f(x): return x"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("stream", [True, False])
def test_several_prompts_and_choices(make_api: MakeApi, tokenizer: Tokenizer, stream: bool) -> None:
    def script(request: GenerationRequest) -> str:
        return f"{tokenizer.decode(request.tokens)}!{request.sampling.seed}"

    api = make_api(script)
    response = post(api, prompt=["one", "two"], n=2, seed=7, stream=stream)
    assert response.status_code == 200
    answers = events(response.text) if stream else [response.json()]
    texts = ["", "", "", ""]
    for answer in answers:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["one!7", "one!8", "two!7", "two!8"]
    if not stream:
        assert answers[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == 12


def test_token_ids(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api("x")
    one, two = tokenizer.encode("first"), tokenizer.encode("second one")
    whole(api, prompt=one)
    whole(api, prompt=[one, two])
    assert {request.tokens for request in api.engine.requests} == {tuple(one), tuple(two)}
    assert len(api.engine.requests) == 3


def test_a_gap_is_filled(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api("x")
    whole(api, prompt="def f(", suffix="): <|im_end|>")
    [request] = api.engine.requests
    prompt = "<|fim_prefix|>def f(<|fim_suffix|>): <|im_end|><|fim_middle|>"
    assert prompt_of(api) == prompt
    assert tokenizer.control_tokens["<|im_end|>"] not in request.tokens
    assert set(tokenizer.encode("<|fim_prefix|>")) <= request.stop_tokens
    assert tokenizer.stop_tokens <= request.stop_tokens


def test_logprobs(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    found = whole(make_api("one two"), logprobs=2)["choices"][0]["logprobs"]
    spelled = [tokenizer.decode([token]) for token in tokenizer.encode("one two")]
    assert found["tokens"] == spelled
    assert found["token_logprobs"] == [-0.25] * len(spelled)
    assert {len(row) for row in found["top_logprobs"]} == {2}
    lengths = [len(text) for text in spelled]
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_stop(make_api: MakeApi) -> None:
    choice = whole(make_api("one two three"), stop="two")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")


def test_one_failure_ends_all(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    def script(request: GenerationRequest) -> Script:
        fails = "two" in tokenizer.decode(request.tokens)
        error = DeviceError("The GPU fell off.") if fails else None
        return Script(tokenizer.encode("x"), endless=not fails, error=error, step_s=0.001)

    api = make_api(script)
    response = post(api, prompt=["one", "two"], max_tokens=-1)
    assert response.status_code == 500
    assert api.engine.wait_until_idle()
    assert api.app.state.generations.load() == Load(0, 0)


def test_all_or_none_are_started(make_api: MakeApi) -> None:
    api = make_api(max_waiting=1)
    assert post(api, prompt=["one", "two"]).status_code == 503
    assert api.engine.wait_until_idle()
    assert api.app.state.generations.load() == Load(0, 0)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": ["a", [3]]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": ["a"] * 40, "n": 2}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"best_of": 3}, "best_of"),
    ({"n": 65}, "n"),
    ({"echo": True, "logprobs": 1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=[json.dumps(body)[:50] for body, _ in BAD])
def test_bad_values_are_named(make_api: MakeApi, body: dict[str, Any], param: str) -> None:
    response = post(make_api(), **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
