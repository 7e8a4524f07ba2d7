"""What a client may send to /v1/chat/completions, and its translation into our own terms.

Owns the request's Structs and the meaning of every parameter; docs/parameters.md lists them.
Pure; runs on the prompt thread.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from daemon.api.conversation import Conversation
from daemon.api.openai_chat_messages import ChatMessage, to_messages
from daemon.api.parameters import Parameters, doc
from daemon.api.reasoning_fields import ReasoningFields, thinking_of
from daemon.api.reply import ReplyRules
from daemon.api.request_body import decode_body
from daemon.api.sampling_fields import sampling_of
from daemon.api.session_hint import session_of
from daemon.api.structured_output import (
    ResponseFormat,
    content_form,
    guide_of,
    read_tool_choice,
)
from daemon.api.tool_definitions import tool_specs
from daemon.engine.requests import EngineInfo, SamplingParams
from daemon.errors import InvalidRequest

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

Stop = Annotated[str, Meta(min_length=1)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]

MESSAGES = doc(
    "roles system, developer (= system), user, assistant, tool; content is a string or text parts "
    "(others are refused); reasoning as `reasoning_content` or `reasoning`; call arguments that "
    "are no JSON object are shown to the model as they are, as one argument named `arguments`; "
    "`prompt_cache_breakpoint` or `cache_control` of a part marks a place to keep"
)
TOOLS = doc(
    "functions, whose `parameters` are a JSON schema in form, and with `strict` are held to; other "
    "types are passed over"
)
TOOL_CHOICE = doc(
    "`auto`; `none` keeps the tools in the prompt, whose prefix stays the same, and bans the token "
    "that opens a call; `required`, a named function and `allowed_tools` are held to"
)
MAX_TOKENS = doc("capped to what the context leaves; -1 is no limit")
STOP = doc("up to 16 strings, looked for in the content, not in reasoning or calls")
FORMAT = doc(
    "`json_schema` and `json_object`: the content has that form; with tools on offer, calls instead"
)
EXPLAIN = doc('`{"explain": true}`: the answer carries its cache plan, a stream at its end')
SESSION = doc(
    "names the session; else `x-session-id`, `x-session-affinity`, `x-affinity`, `thread-id` or "
    "`x-claude-code-session-id` does; else the first messages do"
)

NO_OPS = {
    "metadata": "kept for the provider's dashboard",
    "moderation": "nothing is moderated here",
    "prediction": "a hint of speed",
    "prompt_cache_options": "what is cached, and for how long, is the store's business",
    "prompt_cache_retention": "what is cached, and for how long, is the store's business",
    "safety_identifier": "names a user to the provider",
    "service_tier": "there is one",
    "store": "chat answers are never stored",
    "user": "names a user to the provider",
    "verbosity": "the model knows no such switch",
}
"""Accepted without effect on purpose: they concern the provider's account, storage or speed."""

REFUSED: dict[str, str] = {
    "audio": "this model writes text only",
    "bad_words": "it is not supported; use logit_bias",
    "continue_final_message": "a reply always begins a new message",
    "echo": "the prompt is not sent back",
    "function_call": "it is deprecated; use tool_choice",
    "functions": "it is deprecated; use tools",
    "ignore_eos": "it is not supported",
    "min_tokens": "it is not supported",
    "prompt_logprobs": "log-probabilities of the prompt are not supported",
    "stop_token_ids": "it is not supported; use stop",
    "web_search_options": "this server searches nothing",
}
"""They would change the answer and cannot be honoured: refused unless null, false, 0 or empty."""


class StreamOptions(Struct):
    """`include_obfuscation` pads events against eavesdroppers; accepted without effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CacheOptions(Struct):
    """With `explain`, the answer says what it reused and why not more."""

    explain: bool = False


class ChatRequest(ReasoningFields, kw_only=True):
    """The body."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1), MESSAGES]
    model: Annotated[str | None, doc("its name or an alias, in any case; others answer 404")] = None
    tools: Annotated[list[dict[str, Any]] | None, TOOLS] = None
    tool_choice: Annotated[str | dict[str, Any] | None, TOOL_CHOICE] = None
    parallel_tool_calls: Annotated[bool | None, doc("false ends the reply after a call")] = None
    stream: Annotated[bool | None, doc("events as the reply comes")] = None
    stream_options: Annotated[StreamOptions | None, doc("include_usage")] = None
    max_tokens: Annotated[int | None, MAX_TOKENS] = None
    max_completion_tokens: Annotated[int | None, doc("wins over max_tokens; the same")] = None
    stop: Annotated[Stops, STOP] = None
    logprobs: Annotated[bool | None, doc("of every sampled token, reasoning and calls too")] = None
    top_logprobs: Annotated[TopLogprobs | None, doc("alternatives, up to 20")] = None
    n: Annotated[int | None, doc("1; other values are refused")] = None
    response_format: Annotated[ResponseFormat | None, FORMAT] = None
    modalities: Annotated[list[str] | None, doc('["text"]; others are refused')] = None
    prompt_cache_key: Annotated[str | None, SESSION] = None
    cache: Annotated[CacheOptions | None, EXPLAIN] = None
    return_progress: Annotated[bool | None, doc("streams how far the prompt is")] = None


PARAMETERS = Parameters(
    path="/v1/chat/completions", request=ChatRequest, no_ops=NO_OPS, refused=REFUSED
)


class Ask(Struct, frozen=True, kw_only=True):
    """A chat request in our own terms. `ignored` are the keys that mean nothing to us; with
    `explain`, the answer carries its cache plan."""

    model: str | None
    conversation: Conversation
    rules: ReplyRules
    stream: bool
    include_usage: bool
    explain: bool
    ignored: tuple[str, ...]


def read_ask(
    body: bytes, headers: Mapping[str, str], defaults: SamplingParams, info: EngineInfo
) -> Ask:
    """Decode, check and translate a body.

    Raises:
        InvalidRequest: names the parameter that cannot be honoured.
    """
    chat = decode_body(body, ChatRequest)
    ignored = PARAMETERS.check(body)
    _refuse_values(chat)
    messages = to_messages(chat.messages)
    tools, passed_over = tool_specs(chat.tools or [])
    choice = read_tool_choice(chat.tool_choice, tools)
    single_call = chat.parallel_tool_calls is False
    thinking = thinking_of(chat)
    return Ask(
        model=chat.model,
        conversation=Conversation(
            messages=messages,
            tools=tools,
            template_options=thinking.template_options,
            session=session_of(headers, chat.prompt_cache_key, messages),
        ),
        rules=ReplyRules(
            sampling=sampling_of(chat, defaults, info.vocab_size, _logprobs(chat)),
            max_tokens=_max_tokens(chat),
            stop=_stops(chat.stop),
            forbid_calls=choice.mode == "none" and bool(tools),
            single_call=single_call,
            guide=guide_of(content_form(chat, chat.response_format), choice, tools, single_call),
            thinking_budget=thinking.max_tokens,
            report_progress=bool(chat.return_progress),
        ),
        stream=bool(chat.stream),
        include_usage=chat.stream_options is not None and chat.stream_options.include_usage,
        explain=chat.cache is not None and chat.cache.explain,
        ignored=ignored + passed_over,
    )


def _refuse_values(chat: ChatRequest) -> None:
    if chat.n not in (None, 1):
        raise InvalidRequest("n: only one choice a request is supported; send 1.", "n")
    if chat.modalities not in (None, ["text"]):
        raise InvalidRequest("modalities: this model writes text only.", "modalities")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true.", "top_logprobs")


def _max_tokens(chat: ChatRequest) -> int | None:
    """The newer name wins; -1 means no limit, as some clients write it."""
    for name in ("max_completion_tokens", "max_tokens"):
        value: int | None = getattr(chat, name)
        if value is None:
            continue
        if value == -1:
            return None
        if value < 1:
            raise InvalidRequest(f"{name}: must be at least 1.", name)
        return value
    return None


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _logprobs(chat: ChatRequest) -> int | None:
    return (chat.top_logprobs or 0) if chat.logprobs else None
