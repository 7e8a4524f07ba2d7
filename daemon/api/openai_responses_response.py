"""The objects that /v1/responses answers with: a response and its output items.

Owns their Structs. Pure; event loop.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from daemon.api.errors import error_body
from daemon.api.openai_responses_request import ResponsesRequest
from daemon.api.reply_pieces import Outcome
from daemon.errors import Overloaded

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class SummaryText(Struct, tag_field="type", tag="summary_text"):
    """Reasoning, where a summary was asked for: all of it."""

    text: str


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """Reasoning as it is."""

    text: str


class OutputText(Struct, tag_field="type", tag="output_text"):
    """A message's text."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningItem(Struct, tag_field="type", tag="reasoning", kw_only=True):
    """What was thought; `encrypted_content` brings its exact text back."""

    id: str
    status: ItemStatus = "in_progress"
    summary: list[SummaryText] = []
    content: list[ReasoningText] | UnsetType = UNSET
    encrypted_content: str | UnsetType = UNSET


class MessageItem(Struct, tag_field="type", tag="message", kw_only=True):
    """What was answered."""

    id: str
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class FunctionCallItem(Struct, tag_field="type", tag="function_call", kw_only=True):
    """A call; `arguments` is JSON in a string."""

    id: str
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    arguments: str = ""
    namespace: str | UnsetType = UNSET


class CustomToolCallItem(Struct, tag_field="type", tag="custom_tool_call", kw_only=True):
    """A call of a tool that takes free text."""

    id: str
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    input: str = ""
    namespace: str | UnsetType = UNSET


OutputItem = ReasoningItem | MessageItem | FunctionCallItem | CustomToolCallItem


class InputDetails(Struct):
    """Of the prompt, `cached_tokens` were not evaluated again; `cache_write_tokens` were, and are
    in the store from now on."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Struct):
    """`reasoning_tokens` of the reply came before its thinking was closed."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Tokens; the cached ones are among the input's."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFailure(Struct):
    """Why a response failed."""

    code: str
    message: str


class ResponseObject(Struct, kw_only=True):
    """A response, whole or on its way; what was asked comes back in it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None = None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    service_tier: str = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str]


def response_object(
    response_id: str,
    created: int,
    model: str,
    asked: ResponsesRequest,
    *,
    temperature: float,
    top_p: float,
) -> ResponseObject:
    """A response that has just begun."""
    reasoning = asked.reasoning
    return ResponseObject(
        id=response_id,
        created_at=created,
        model=model,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        prompt_cache_key=asked.prompt_cache_key,
        reasoning={
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary if reasoning is not None else None,
        },
        store=asked.store is not False,
        temperature=temperature,
        text={"format": _text_format(asked)},
        tool_choice=asked.tool_choice or "auto",
        tools=asked.tools or [],
        top_p=top_p,
        metadata=asked.metadata or {},
    )


def _text_format(asked: ResponsesRequest) -> dict[str, Any]:
    form = asked.text.format if asked.text is not None else None
    given = msgspec.structs.asdict(form) if form is not None else {"type": "text"}
    return {name: value for name, value in given.items() if value is not None}


def usage_of(outcome: Outcome) -> ResponseUsage:
    """The token counts of a reply."""
    return ResponseUsage(
        outcome.num_prompt_tokens,
        InputDetails(outcome.num_cached_tokens, outcome.num_written_tokens),
        outcome.num_reply_tokens,
        OutputDetails(outcome.num_reasoning_tokens),
        outcome.num_prompt_tokens + outcome.num_reply_tokens,
    )


def failure_of(error: Exception) -> ResponseFailure:
    """Why a response broke off, by the codes that clients decide on whether to retry."""
    code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
    return ResponseFailure(code, error_body(error).message)
