"""What a client may send to /v1/messages, and its translation into our own terms.

Owns the request's Structs and the meaning of every parameter; docs/parameters.md lists them.
Pure; runs on the prompt thread.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from daemon.api.anthropic_messages_content import (
    AnthropicMessage,
    Block,
    CacheControl,
    to_messages,
)
from daemon.api.conversation import Conversation
from daemon.api.parameters import Parameters, doc
from daemon.api.reasoning_fields import wish_of
from daemon.api.reply import ReplyRules
from daemon.api.request_body import decode_body
from daemon.api.sampling_fields import Share, Temperature, TopK
from daemon.api.session_hint import session_of
from daemon.api.structured_output import guide_of, json_schema_form, read_tool_choice
from daemon.api.tool_definitions import check_parameters, function_tool, refuse_twice
from daemon.engine.requests import SamplingParams
from daemon.errors import InvalidRequest
from daemon.text.messages import Message, ToolSpec
from daemon.text.reply_grammar import ContentForm, Guide

MAX_STOPS = 16

Stop = Annotated[str, Meta(min_length=1)]
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)]
Name = Annotated[str, Meta(pattern=r"^[^\s<>]{1,256}$")]

NO_OPS = {
    "container": "nothing runs on this server",
    "context_management": "the template drops past thinking; tool results stay",
    "fallbacks": "one model is served",
    "inference_geo": "it runs here",
    "metadata": "names a user to the provider",
    "service_tier": "there is one",
    "speed": "there is one",
}
REFUSED = {
    "mcp_servers": "this server calls no other",
    "prefill": "a reply always begins a new message",
    "thread": "threads are not kept; send the messages",
}

MESSAGES = doc(
    "roles user, assistant, and system anywhere; blocks text, thinking (its signature brings back "
    "the exact text), redacted_thinking, tool_use, tool_result with text and tool_reference; "
    "`cache_control` marks a place to keep; images and documents are refused"
)
SYSTEM = doc("text, or text blocks; a line with the provider's billing header is left out")
TOOLS = doc(
    "name, description, input_schema; `defer_loading` leaves a tool out of the prompt until a "
    "tool_reference shows it; tools that the provider would run are passed over"
)
TOOL_CHOICE = doc(
    "`auto`, `none`, `any` and `tool`; `disable_parallel_tool_use` ends the reply after a call"
)
MAX_TOKENS = doc("needed; capped to what the context leaves; 0 evaluates and keeps the prompt")
THINKING = doc(
    "`enabled` and `adaptive` switch it on, `disabled` or none off; `display` omitted leaves the "
    "text to the signature; after `budget_tokens` it is led to its end"
)


class AnthropicTool(Struct):
    """A tool; `type` is absent or custom for those that the client runs."""

    name: Name
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[str] | None = None


class AnthropicChoice(Struct):
    """Whether tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct):
    """Whether to think before answering, and whether to show it."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct):
    """The form that the answer must have."""

    type: Literal["json_schema"]
    schema: dict[str, Any] | None = None


class OutputConfig(Struct):
    """How hard to try, and in which form to answer."""

    effort: str | None = None
    format: OutputFormat | None = None


class Diagnostics(Struct):
    """Asks why a prompt was not reused."""

    previous_message_id: str | None = None


class MessagesRequest(Struct, kw_only=True):
    """The body; that of count_tokens too, which has no `max_tokens`."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1), MESSAGES]
    model: Annotated[str | None, doc("its name or an alias, in any case; others answer 404")] = None
    max_tokens: Annotated[int | None, MAX_TOKENS] = None
    system: Annotated[str | list[Block] | None, SYSTEM] = None
    stream: Annotated[bool | None, doc("events as the reply comes")] = None
    temperature: Annotated[Temperature | None, doc("0 to 2; 0 is greedy")] = None
    top_p: Annotated[Share | None, doc("0 to 1")] = None
    top_k: Annotated[TopK | None, doc("0 and -1 switch it off")] = None
    stop_sequences: Annotated[Stops | None, doc("up to 16, looked for in the text")] = None
    tools: Annotated[list[AnthropicTool] | None, TOOLS] = None
    tool_choice: Annotated[AnthropicChoice | None, TOOL_CHOICE] = None
    thinking: Annotated[Thinking | None, THINKING] = None
    output_config: Annotated[OutputConfig | None, doc("`effort` as in chat; `format`")] = None
    output_format: Annotated[OutputFormat | None, doc("json_schema")] = None
    cache_control: Annotated[CacheControl | None, doc("marks the end of the last message")] = None
    diagnostics: Annotated[Diagnostics | None, doc("the answer says why it missed")] = None


PARAMETERS = Parameters(
    path="/v1/messages", request=MessagesRequest, no_ops=NO_OPS, refused=REFUSED
)


class MessagesAsk(Struct, frozen=True, kw_only=True):
    """A request in our own terms. `ignored` is what means nothing to us.

    `shows_thinking` False leaves its text to the signatures; `diagnoses` adds why the prompt was
    not reused, `follows` that the client names the message before.
    """

    model: str | None
    conversation: Conversation
    rules: ReplyRules
    stream: bool
    shows_thinking: bool
    diagnoses: bool
    follows: bool
    ignored: tuple[str, ...]


def read_ask(
    body: bytes, headers: Mapping[str, str], defaults: SamplingParams, *, counting: bool = False
) -> MessagesAsk:
    """Decode, check and translate a body.

    Args:
        counting: only its tokens are asked for.

    Raises:
        InvalidRequest: names the parameter that cannot be honoured.
    """
    asked = decode_body(body, MessagesRequest)
    ignored = PARAMETERS.check(body)
    _refuse_values(asked, counting)
    tools, deferred, passed_over = _tools(asked.tools or [])
    messages = _messages(asked, deferred)
    choice = asked.tool_choice or AnthropicChoice("auto")
    thinking = asked.thinking or Thinking("disabled")
    effort = asked.output_config.effort if asked.output_config is not None else None
    wish = wish_of(effort, thinking.budget_tokens, thinking.type != "disabled")
    return MessagesAsk(
        model=asked.model,
        conversation=Conversation(
            messages=messages,
            tools=tools,
            deferred_tools=deferred,
            template_options=wish.template_options,
            session=session_of(headers, None, messages),
        ),
        rules=ReplyRules(
            sampling=_sampling(asked, defaults),
            max_tokens=asked.max_tokens,
            stop=tuple(asked.stop_sequences or ()),
            forbid_calls=choice.type == "none" and bool(tools),
            single_call=choice.disable_parallel_tool_use,
            guide=_guide(asked, choice, (*tools, *deferred)),
            thinking_budget=wish.max_tokens,
        ),
        stream=bool(asked.stream),
        shows_thinking=thinking.display != "omitted",
        diagnoses=asked.diagnostics is not None,
        follows=bool(asked.diagnostics and asked.diagnostics.previous_message_id),
        ignored=ignored + passed_over,
    )


def _refuse_values(asked: MessagesRequest, counting: bool) -> None:
    if not counting and (asked.max_tokens is None or asked.max_tokens < 0):
        raise InvalidRequest("max_tokens: must be given, and be at least 0.", "max_tokens")
    if asked.messages[-1].role == "assistant":
        raise InvalidRequest(
            "messages: the last one is the assistant's; a reply always begins a new message.",
            "messages",
        )


def _messages(asked: MessagesRequest, deferred: tuple[ToolSpec, ...]) -> tuple[Message, ...]:
    messages = to_messages(
        asked.system,
        asked.messages,
        {spec.name: spec for spec in deferred},
        marks_tools=any(tool.cache_control is not None for tool in asked.tools or ()),
    )
    if asked.cache_control is None:
        return messages
    last = messages[-1]
    marked = msgspec.structs.replace(last, marks=(*last.marks, len(last.content)))
    return (*messages[:-1], marked)


def _tools(
    offered: list[AnthropicTool],
) -> tuple[tuple[ToolSpec, ...], tuple[ToolSpec, ...], tuple[str, ...]]:
    """Those to list, those deferred, and the names of those passed over."""
    listed: list[ToolSpec] = []
    deferred: list[ToolSpec] = []
    passed_over: list[str] = []
    for index, tool in enumerate(offered):
        path = f"tools[{index}]"
        if tool.type not in (None, "custom"):
            passed_over.append(f"{path} ({tool.type})")
            continue
        parameters = tool.input_schema or {}
        check_parameters(parameters, f"{path}.input_schema")
        specs = deferred if tool.defer_loading else listed
        strict = bool(tool.strict)
        specs.append(function_tool(tool.name, tool.description, parameters, strict))
        refuse_twice([*listed, *deferred] if specs is deferred else [*deferred, *listed], path)
    return tuple(listed), tuple(deferred), tuple(passed_over)


def _guide(
    asked: MessagesRequest, choice: AnthropicChoice, tools: tuple[ToolSpec, ...]
) -> Guide | None:
    given = {"any": "any", "none": "none", "auto": "auto"}.get(choice.type)
    named = {"type": "function", "name": choice.name}
    read = read_tool_choice(given if given is not None else named, tools)
    return guide_of(_content_form(asked), read, tools, choice.disable_parallel_tool_use)


def _content_form(asked: MessagesRequest) -> ContentForm | None:
    config = asked.output_config or OutputConfig()
    given = {"output_config.format": config.format, "output_format": asked.output_format}
    for param, form in given.items():
        if form is not None and form.schema is None:
            raise InvalidRequest(f"{param}.schema: is missing.", f"{param}.schema")
        if form is not None:
            return json_schema_form(form.schema, f"{param}.schema")
    return None


def _sampling(asked: MessagesRequest, defaults: SamplingParams) -> SamplingParams:
    given = {"temperature": asked.temperature, "top_p": asked.top_p}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if asked.top_k is not None:
        changes["top_k"] = max(0, asked.top_k)
    return msgspec.structs.replace(defaults, **changes)
