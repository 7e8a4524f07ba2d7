"""The official openai client against a real server on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from fakes import Script
from http_harness import USER, ApiHarness

from daemon.engine.requests import GenerationRequest
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]
Serve = Callable[[ApiHarness], str]

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
CALL = (
    "I add.\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n"
    "<parameter=b>\n3\n</parameter>\n</function>\n</tool_call>"
)


@contextmanager
def client_of(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_tool_loop(make_api: MakeApi, serve: Serve, tokenizer: Tokenizer) -> None:
    def script(request: GenerationRequest) -> str:
        asked = "<tool_response>\n5" not in tokenizer.decode(request.tokens)
        return CALL if asked else "Done.\n</think>\n\nIt is 5."

    with client_of(serve(make_api(script))) as client:
        messages: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
        first = client.chat.completions.create(model="tiny-coder", messages=messages, tools=[TOOL])
        assert first.choices[0].finish_reason == "tool_calls"
        [call] = first.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
        messages += [
            first.choices[0].message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "5"},
        ]
        second = client.chat.completions.create(model="tiny-coder", messages=messages, tools=[TOOL])
        assert second.choices[0].message.content == "It is 5."
        assert second.usage is not None
        assert second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens == 3


def test_stream(make_api: MakeApi, serve: Serve) -> None:
    with client_of(serve(make_api("Hm.\n</think>\n\nHi there."))) as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny-coder",
                messages=USER,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hi there."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_accumulating_stream_helper(make_api: MakeApi, serve: Serve) -> None:
    with (
        client_of(serve(make_api(CALL))) as client,
        client.chat.completions.stream(model="tiny-coder", messages=USER, tools=[TOOL]) as stream,
    ):
        completion = stream.get_final_completion()
    [call] = completion.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"a": 2, "b": 3}


def test_errors_have_their_classes(make_api: MakeApi, serve: Serve, tokenizer: Tokenizer) -> None:
    failing = Script(tokenizer.encode("a"), error=openai_error())
    with client_of(serve(make_api(failing, context_length=64))) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as unknown:
            create(model="gpt-4", messages=USER)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            create(model="tiny-coder", messages=[{"role": "user", "content": "word " * 99}])
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.InternalServerError):
            create(model="tiny-coder", messages=USER)
        with pytest.raises(openai.APIError, match="fell off"):
            list(create(model="tiny-coder", messages=USER, stream=True))


def openai_error() -> Any:
    from daemon.errors import DeviceError

    return DeviceError("The GPU fell off.")


def test_models(make_api: MakeApi, serve: Serve) -> None:
    with client_of(serve(make_api())) as client:
        [model] = client.models.list().data
        assert model.id == "tiny-coder"
        assert model.model_dump()["context_length"] == 32768
        assert client.models.retrieve("qwen3.5-local").id == "tiny-coder"


def test_streams_do_not_wait_for_one_another(
    make_api: MakeApi, serve: Serve, tokenizer: Tokenizer
) -> None:
    endless = Script(tokenizer.encode("</think>\n\nword"), endless=True, step_s=0.002)

    def script(request: GenerationRequest) -> Script | str:
        is_endless = "endless" in tokenizer.decode(request.tokens)
        return endless if is_endless else "x\n</think>\n\nshort"

    api = make_api(script)
    with client_of(serve(api)) as client:
        long = client.chat.completions.create(
            model="tiny-coder", messages=[{"role": "user", "content": "endless"}], stream=True
        )
        next(iter(long))  # and no more is read of it: a slow client
        answers: list[str | None] = []

        def ask() -> None:
            answer = client.chat.completions.create(model="tiny-coder", messages=USER)
            answers.append(answer.choices[0].message.content)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert answers == ["short"] * 4
        assert api.engine.cancelled == []
        long.close()
        assert api.engine.wait_until_idle()
    assert api.engine.cancelled == [api.engine.requests[0].id]


RESPONSES_TOOL: Any = {"type": "function", **TOOL["function"], "strict": False}


def test_responses_tool_loop(make_api: MakeApi, serve: Serve, tokenizer: Tokenizer) -> None:
    def script(request: GenerationRequest) -> str:
        asked = "<tool_response>\n5" not in tokenizer.decode(request.tokens)
        return CALL if asked else "Done.\n</think>\n\nIt is 5."

    with client_of(serve(make_api(script))) as client:
        create = client.responses.create
        first = create(model="tiny-coder", input="What is 2 + 3?", tools=[RESPONSES_TOOL])
        reasoning, call = first.output
        assert (reasoning.type, call.type) == ("reasoning", "function_call")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        with client.responses.stream(
            model="tiny-coder",
            input=[result],
            tools=[RESPONSES_TOOL],
            previous_response_id=first.id,
        ) as stream:
            second = stream.get_final_response()
        assert second.output_text == "It is 5."
        assert second.usage is not None
        assert second.usage.input_tokens_details.cached_tokens == 3
        assert client.responses.retrieve(second.id).output_text == "It is 5."
        counted = client.responses.input_tokens.count(model="tiny-coder", input="What is 2 + 3?")
        assert counted.input_tokens > 0
        client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(second.id)


def test_completions(make_api: MakeApi, serve: Serve) -> None:
    with client_of(serve(make_api("x): return x"))) as client:
        create = client.completions.create
        whole = create(model="tiny-coder", prompt="def f(", suffix="\n", max_tokens=50)
        assert whole.choices[0].text == "x): return x"
        chunks = create(model="tiny-coder", prompt="def f(", max_tokens=50, stream=True)
        assert "".join(c.text for chunk in chunks for c in chunk.choices) == "x): return x"
