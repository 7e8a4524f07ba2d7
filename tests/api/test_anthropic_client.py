"""The official anthropic client against a real server on loopback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest
from http_harness import ApiHarness

from daemon.engine.requests import GenerationRequest
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]
Serve = Callable[[ApiHarness], str]

USER: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
TOOL: Any = {
    "name": "add",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    },
}
CALL = (
    "I add.\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n"
    "<parameter=b>\n3\n</parameter>\n</function>\n</tool_call>"
)
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@contextmanager
def client_of(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_tool_loop(make_api: MakeApi, serve: Serve, tokenizer: Tokenizer) -> None:
    def script(request: GenerationRequest) -> str:
        asked = "<tool_response>\n5" not in tokenizer.decode(request.tokens)
        return CALL if asked else "Done.\n</think>\n\nIt is 5."

    asked: dict[str, Any] = {
        "model": "tiny-coder", "max_tokens": 500, "tools": [TOOL], "thinking": THINKING,
    }  # fmt: skip
    with client_of(serve(make_api(script))) as client:
        with client.messages.stream(messages=USER, **asked) as stream:
            first = stream.get_final_message()
        assert first.stop_reason == "tool_use"
        thinking, call = first.content
        assert (thinking.type, call.type) == ("thinking", "tool_use")
        assert call.input == {"a": 2, "b": 3}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "5"}
        history = [*USER, first.to_param(), {"role": "user", "content": [result]}]
        second = client.messages.create(messages=history, **asked)
        assert [block.type for block in second.content] == ["thinking", "text"]
        assert second.usage.cache_read_input_tokens == 3
        counted = client.messages.count_tokens(
            model="tiny-coder", messages=history, tools=[TOOL], thinking=THINKING
        )
        usage = second.usage
        written = usage.cache_creation_input_tokens or 0
        assert counted.input_tokens == usage.input_tokens + 3 + written


def test_errors_have_their_classes(make_api: MakeApi, serve: Serve) -> None:
    with client_of(serve(make_api(context_length=64))) as client:
        create = client.messages.create
        with pytest.raises(anthropic.NotFoundError):
            create(model="claude-9", messages=USER, max_tokens=9)
        long: Any = [{"role": "user", "content": "word " * 99}]
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            create(model="tiny-coder", messages=long, max_tokens=9)


def test_models(make_api: MakeApi, serve: Serve) -> None:
    with client_of(serve(make_api())) as client:
        [model] = client.models.list().data
        assert (model.id, model.type) == ("tiny-coder", "model")
        assert model.max_input_tokens == 32768
        assert client.models.retrieve("qwen3.5-local").display_name == "tiny-coder"
