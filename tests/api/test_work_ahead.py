"""When a reply has ended, what its next request will begin with is given to the engine."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from http_harness import ApiHarness
from scripted_app import TextSide

from daemon.api.app import create_app
from daemon.engine.requests import GenerationRequest

MakeApi = Callable[..., ApiHarness]
TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
CALL = (
    "<tool_call>\n<function=read>\n<parameter=path>\na.py\n</parameter>\n</function>\n</tool_call>"
)
QUESTION = {"role": "user", "content": "What does a.py do?"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "print(1)"}


def that_works_ahead(api: ApiHarness) -> ApiHarness:
    service = msgspec.structs.replace(api.service, works_ahead=True)
    return ApiHarness(create_app(service), service, api.engine, api.replies)


def ask(
    api: ApiHarness, messages: list[Any], **body: Any
) -> tuple[GenerationRequest, GenerationRequest | None]:
    """The request as the engine got it, and what it was given ahead of the next."""

    async def exchange() -> None:
        response = await api.post(messages=messages, **body)
        assert response.status_code == 200, response.text
        refused = await api.post(messages=[])
        assert refused.status_code == 400, "it came to the prompt thread, behind the work ahead"

    api.engine.requests.clear()
    asyncio.run(exchange())
    first, *rest = api.engine.requests
    assert len(rest) <= 1
    return first, rest[0] if rest else None


def call_message(reasoning: str) -> dict[str, Any]:
    call = {"name": "read", "arguments": json.dumps({"path": "a.py"})}
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": reasoning,
        "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
    }


def is_beginning(request: GenerationRequest, prompt: GenerationRequest, most_left: int) -> bool:
    size = len(request.tokens)
    return request.tokens == prompt.tokens[:size] and len(prompt.tokens) - size <= most_left


def test_before_a_new_question_the_thinking_is_dropped(make_api: MakeApi, text: TextSide) -> None:
    api = that_works_ahead(make_api("It prints.\n</think>\n\nIt prints 1."))
    history = [QUESTION, call_message("Look first."), RESULT]
    prompt, ahead = ask(api, history, tools=[TOOL])
    assert ahead is not None
    assert (ahead.priority, ahead.max_tokens) == ("next", 0)
    assert ahead.boundaries[-1].position == len(ahead.tokens)
    assert "think" in text.tokenizer.decode(prompt.tokens)
    assert "think" not in text.tokenizer.decode(ahead.tokens)
    answer = {"role": "assistant", "content": "It prints 1.", "reasoning_content": "It prints."}
    again = {"role": "user", "content": "Sure?"}
    following, _ = ask(api, [*history, answer, again], tools=[TOOL])
    num_new = len(text.tokenizer.encode("<|im_start|>user\nSure?<|im_end|>\n"))
    assert is_beginning(ahead, following, num_new + 10)


def test_before_a_calls_result_all_stays(make_api: MakeApi) -> None:
    api = that_works_ahead(make_api(f"Look first.\n</think>\n\n{CALL}"))
    _, ahead = ask(api, [QUESTION], tools=[TOOL])
    following, _ = ask(api, [QUESTION, call_message("Look first."), RESULT], tools=[TOOL])
    assert ahead is not None
    assert is_beginning(ahead, following, 40)


def test_what_a_stop_string_cut_off_is_not_prepared(make_api: MakeApi, text: TextSide) -> None:
    api = that_works_ahead(make_api("\n</think>\n\nOne. STOP Two."))
    _, ahead = ask(api, [QUESTION], stop="STOP")
    assert ahead is not None
    assert text.tokenizer.decode(ahead.tokens).endswith("\nOne. <|im_end|>\n")


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 3},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_nothing_is_prepared_after_what_nobody_goes_on_from(
    make_api: MakeApi, body: dict[str, Any]
) -> None:
    reply = "\n</think>\n\n{}" if "response_format" in body else "\n</think>\n\nA long answer."
    _, ahead = ask(that_works_ahead(make_api(reply)), [QUESTION], **body)
    assert ahead is None
