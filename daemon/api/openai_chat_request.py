"""What a client may send to /v1/chat/completions, and its translation into our own terms.

Owns the request's Structs and the meaning of every parameter; README.md lists them. Pure; runs on
the prompt thread.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from daemon.api.generation import Conversation
from daemon.api.openai_chat_messages import ChatMessage, to_messages
from daemon.api.reply import ReplyRules
from daemon.api.request_body import decode_body, keys_of
from daemon.api.session_hint import session_of
from daemon.api.tool_definitions import tool_specs
from daemon.engine.requests import EngineInfo, SamplingParams
from daemon.errors import InvalidRequest

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1)]

NO_OPS = frozenset(
    {
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Accepted without effect on purpose: they concern the provider's account, storage or speed."""

REFUSED: dict[str, str] = {
    "audio": "this model writes text only",
    "bad_words": "it is not supported; use logit_bias",
    "continue_final_message": "a reply always begins a new message",
    "echo": "the prompt is not sent back",
    "function_call": "it is deprecated; use tool_choice",
    "functions": "it is deprecated; use tools",
    "grammar": "constrained decoding is not supported",
    "guided_choice": "constrained decoding is not supported",
    "guided_grammar": "constrained decoding is not supported",
    "guided_json": "constrained decoding is not supported",
    "guided_regex": "constrained decoding is not supported",
    "ignore_eos": "it is not supported",
    "json_schema": "constrained decoding is not supported",
    "min_tokens": "it is not supported",
    "prompt_logprobs": "log-probabilities of the prompt are not supported",
    "stop_token_ids": "it is not supported; use stop",
    "structured_outputs": "constrained decoding is not supported",
    "thinking_budget": "it is not supported; use enable_thinking",
    "web_search_options": "this server searches nothing",
}
"""They would change the answer and cannot be honoured: refused unless null, false, 0 or empty."""


class StreamOptions(Struct):
    """`include_obfuscation` pads events against eavesdroppers; accepted without effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Struct):
    """Which form the answer must have."""

    type: str


class CacheOptions(Struct):
    """With `explain`, the answer says what it reused and why not more."""

    explain: bool = False


class ChatRequest(Struct, kw_only=True):
    """The body. Fields that are None take the model's own recommended value."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    cache: CacheOptions | None = None


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
    unknown = [key for key in keys_of(body) if key not in ChatRequest.__struct_fields__]
    _refuse(body, unknown)
    _refuse_values(chat)
    messages = to_messages(chat.messages)
    tools = tool_specs(chat.tools or [])
    return Ask(
        model=chat.model,
        conversation=Conversation(
            messages=messages,
            tools=tools,
            template_options=_template_options(chat),
            session=session_of(headers, chat.prompt_cache_key, messages),
        ),
        rules=ReplyRules(
            sampling=_sampling(chat, defaults, info),
            max_tokens=_max_tokens(chat),
            stop=_stops(chat.stop),
            forbid_calls=chat.tool_choice == "none" and bool(tools),
            single_call=chat.parallel_tool_calls is False,
        ),
        stream=bool(chat.stream),
        include_usage=chat.stream_options is not None and chat.stream_options.include_usage,
        explain=chat.cache is not None and chat.cache.explain,
        ignored=tuple(key for key in unknown if key not in NO_OPS and key not in REFUSED),
    )


def _refuse(body: bytes, unknown: Sequence[str]) -> None:
    refused = [key for key in unknown if key in REFUSED]
    if not refused:
        return
    values = msgspec.json.decode(body)
    for key in refused:
        if values[key]:
            raise InvalidRequest(f"{key}: {REFUSED[key]}.", key)


def _refuse_values(chat: ChatRequest) -> None:
    if chat.n not in (None, 1):
        raise InvalidRequest("n: only one choice a request is supported; send 1.", "n")
    if chat.response_format is not None and chat.response_format.type != "text":
        raise InvalidRequest(
            f"response_format: {chat.response_format.type!r} is not supported; only 'text' is.",
            "response_format",
        )
    if chat.modalities not in (None, ["text"]):
        raise InvalidRequest("modalities: this model writes text only.", "modalities")
    if chat.tool_choice not in (None, "auto", "none"):
        raise InvalidRequest(
            "tool_choice: only 'auto' and 'none' are supported; a call cannot be forced.",
            "tool_choice",
        )
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


def _template_options(chat: ChatRequest) -> dict[str, Any]:
    """`reasoning_effort`, overridden by `enable_thinking`, overridden by `chat_template_kwargs`.

    The efforts "none" and "minimal" switch thinking off. Others are handed to the template, which
    may know them or not.
    """
    options: dict[str, Any] = {}
    if chat.reasoning_effort in ("none", "minimal"):
        options["enable_thinking"] = False
    elif chat.reasoning_effort is not None:
        options["reasoning_effort"] = chat.reasoning_effort
    if chat.enable_thinking is not None:
        options["enable_thinking"] = chat.enable_thinking
    return options | (chat.chat_template_kwargs or {})


def _sampling(chat: ChatRequest, defaults: SamplingParams, info: EngineInfo) -> SamplingParams:
    changes: dict[str, Any] = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if (value := getattr(chat, name)) is not None
    }
    if chat.top_k is not None:
        changes["top_k"] = max(0, chat.top_k)
    if chat.seed is not None:
        changes["seed"] = chat.seed % 2**63
    if chat.logit_bias:
        changes["logit_bias"] = _logit_bias(chat.logit_bias, info.vocab_size)
    if chat.logprobs:
        changes["logprobs"] = chat.top_logprobs or 0
    return msgspec.structs.replace(defaults, **changes)


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: {key!r} is not a token id below {vocab_size}.", "logit_bias"
            )
    return tuple((int(key), value) for key, value in bias.items())
