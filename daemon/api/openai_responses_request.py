"""What a client may send to /v1/responses, and its translation into our own terms.

Owns the request's Structs and the meaning of every parameter; docs/parameters.md lists them.
Pure; runs on the prompt thread.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Struct

from daemon.api.conversation import Conversation
from daemon.api.openai_responses_items import read_items, to_messages
from daemon.api.openai_responses_tools import OfferedTools, read_tools
from daemon.api.parameters import Parameters, doc
from daemon.api.reasoning_fields import wish_of
from daemon.api.reply import ReplyRules
from daemon.api.request_body import decode_body
from daemon.api.sampling_fields import SamplingFields, sampling_of
from daemon.api.session_hint import session_of
from daemon.api.structured_output import (
    guide_of,
    json_object,
    json_schema_form,
    read_tool_choice,
)
from daemon.engine.requests import EngineInfo, SamplingParams
from daemon.errors import InvalidRequest
from daemon.text.messages import Message
from daemon.text.reply_grammar import ContentForm

NO_OPS = {
    "access_programs": "concerns the provider's account",
    "client_metadata": "kept for the provider's dashboard",
    "context_management": "nothing is compacted here; a prompt that is too long is refused",
    "max_tool_calls": "bounds tools that the provider runs, of which there are none",
    "moderation": "nothing is moderated here",
    "prompt_cache_options": "what is cached, and for how long, is the store's business",
    "prompt_cache_retention": "what is cached, and for how long, is the store's business",
    "safety_identifier": "names a user to the provider",
    "service_tier": "there is one",
    "stream_options": "its obfuscation hides sizes from eavesdroppers; this is your own machine",
    "user": "names a user to the provider",
}
REFUSED = {
    "background": "a response is generated while its client waits",
    "background_options": "a response is generated while its client waits",
    "conversation": "conversations are not kept; use previous_response_id",
    "prompt": "prompt templates are not kept; send the messages",
    "top_logprobs": "log-probabilities are in /v1/chat/completions",
}
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"

INPUT = doc(
    "text, or items: message (roles user, assistant, system, developer), reasoning, function_call, "
    "function_call_output, custom_tool_call, custom_tool_call_output; items of tools that a "
    "provider ran are passed over, images and files refused"
)
TOOLS = doc(
    "function, namespace of functions, custom (the model is shown its grammar, and not held to "
    "it); tools that the provider would run are passed over"
)
STORE = doc(
    "true unless false: the response can be fetched, deleted and continued while the daemon runs "
    "and memory lasts"
)
INCLUDE = doc(
    "`reasoning.encrypted_content`; log-probabilities are refused; what belongs to the provider's "
    "tools has no effect"
)
SUMMARY = doc("`effort` as in chat; with `summary`, reasoning comes as summary instead of content")


class Reasoning(Struct):
    """How hard to think, and in which form to show it."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(Struct):
    """The form that the answer must have; `schema` belongs to json_schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """Form and length of the text; `verbosity` has no effect, the model knows no such switch."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(SamplingFields, kw_only=True):
    """The body."""

    input: Annotated[str | list[dict[str, Any]], INPUT]
    model: Annotated[str | None, doc("its name or an alias, in any case; others answer 404")] = None
    instructions: Annotated[str | None, doc("the system prompt of this response alone")] = None
    previous_response_id: Annotated[str | None, doc("goes on from a stored response")] = None
    store: Annotated[bool | None, STORE] = None
    stream: Annotated[bool | None, doc("events as the reply comes")] = None
    tools: Annotated[list[dict[str, Any]] | None, TOOLS] = None
    tool_choice: Annotated[str | dict[str, Any] | None, doc("as in chat")] = None
    parallel_tool_calls: Annotated[bool | None, doc("false ends the reply after a call")] = None
    max_output_tokens: Annotated[int | None, doc("capped to what the context leaves")] = None
    reasoning: Annotated[Reasoning | None, SUMMARY] = None
    text: Annotated[TextOptions | None, doc("`format` text, json_object, json_schema")] = None
    truncation: Annotated[str | None, doc("`disabled`; `auto` is refused")] = None
    include: Annotated[list[str] | None, INCLUDE] = None
    metadata: Annotated[dict[str, str] | None, doc("comes back in the response")] = None
    prompt_cache_key: Annotated[str | None, doc("names the session, as in chat")] = None


PARAMETERS = Parameters(
    path="/v1/responses", request=ResponsesRequest, no_ops=NO_OPS, refused=REFUSED
)


class ResponsesAsk(Struct, frozen=True, kw_only=True):
    """A request in our own terms. `ignored` is what means nothing to us.

    `messages` are those of the input alone. `summarises` shows reasoning as a summary; `seals`
    adds it in a form to send back.
    """

    asked: ResponsesRequest
    messages: tuple[Message, ...]
    tools: OfferedTools
    session: str
    template_options: dict[str, Any]
    rules: ReplyRules
    summarises: bool
    seals: bool
    ignored: tuple[str, ...]

    def conversation(self, history: tuple[Message, ...] = ()) -> Conversation:
        """What is to be answered, after the messages of a stored response."""
        messages = (*history, *self.messages)
        if self.asked.instructions:
            messages = (Message(role="system", content=self.asked.instructions), *messages)
        return Conversation(
            messages=messages,
            tools=self.tools.specs,
            template_options=self.template_options,
            session=self.session,
        )


def read_ask(
    body: bytes, headers: Mapping[str, str], defaults: SamplingParams, info: EngineInfo
) -> ResponsesAsk:
    """Decode, check and translate a body.

    Raises:
        InvalidRequest: names the parameter that cannot be honoured.
    """
    asked = decode_body(body, ResponsesRequest)
    ignored = PARAMETERS.check(body)
    _refuse_values(asked)
    tools = read_tools(asked.tools or [])
    translation = to_messages(read_items(asked.input), tools.names)
    reasoning = asked.reasoning or Reasoning()
    thinking = wish_of(reasoning.effort, None, None)
    choice = read_tool_choice(_named_as_shown(asked.tool_choice, tools), tools.specs)
    single_call = asked.parallel_tool_calls is False
    return ResponsesAsk(
        asked=asked,
        messages=translation.messages,
        tools=tools,
        session=session_of(headers, asked.prompt_cache_key, translation.messages),
        template_options=thinking.template_options,
        rules=ReplyRules(
            sampling=sampling_of(asked, defaults, info.vocab_size),
            max_tokens=asked.max_output_tokens,
            forbid_calls=choice.mode == "none" and bool(tools.specs),
            single_call=single_call,
            guide=guide_of(_content_form(asked.text), choice, tools.specs, single_call),
            thinking_budget=thinking.max_tokens,
        ),
        summarises=(reasoning.summary or reasoning.generate_summary) is not None,
        seals=ENCRYPTED in (asked.include or ()),
        ignored=(*ignored, *tools.passed_over, *translation.passed_over),
    )


def _refuse_values(asked: ResponsesRequest) -> None:
    if asked.max_output_tokens is not None and asked.max_output_tokens < 1:
        raise InvalidRequest("max_output_tokens: must be at least 1.", "max_output_tokens")
    if asked.truncation not in (None, "disabled"):
        raise InvalidRequest("truncation: nothing is left out; send 'disabled'.", "truncation")
    if LOGPROBS in (asked.include or ()):
        raise InvalidRequest(f"include: {LOGPROBS!r} is not supported.", "include")


def _named_as_shown(choice: str | dict[str, Any] | None, tools: OfferedTools) -> object:
    """A choice of a custom tool, or of one in a namespace, by the name that the model sees."""
    if not isinstance(choice, dict) or choice.get("type") not in ("function", "custom"):
        return choice
    name = tools.names.shown(str(choice.get("name", "")), choice.get("namespace"))
    return {"type": "function", "name": name}


def _content_form(text: TextOptions | None) -> ContentForm | None:
    form = text.format if text is not None else None
    match form:
        case TextFormat(type="json_object"):
            return json_object("text.format")
        case TextFormat(type="json_schema", schema=None):
            raise InvalidRequest("text.format.schema: is missing.", "text.format.schema")
        case TextFormat(type="json_schema", schema=schema):
            return json_schema_form(schema, "text.format.schema")
    return None
