"""What a client may send to /v1/completions, and its translation into our own terms.

Owns the request's Structs and the meaning of every parameter; docs/parameters.md lists them.
Pure; runs on the prompt thread.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from daemon.api.conversation import RawPrompt
from daemon.api.openai_chat_request import MAX_TOP_LOGPROBS, NO_OPS, STOP, Stops, StreamOptions
from daemon.api.parameters import Parameters, doc
from daemon.api.reply import ReplyRules
from daemon.api.request_body import decode_body
from daemon.api.sampling_fields import sampling_of
from daemon.api.session_hint import session_of
from daemon.api.structured_output import (
    GuidedFields,
    ResponseFormat,
    ToolChoice,
    content_form,
    guide_of,
)
from daemon.engine.requests import SamplingParams
from daemon.errors import InvalidRequest
from daemon.text.messages import Message
from daemon.text.prompt import Prompt
from daemon.text.raw_prompt import gap_ends, gap_prompt, text_prompt, token_prompt
from daemon.text.tokenizer import Tokenizer

MAX_CHOICES = 64
DEFAULT_MAX_TOKENS = 16
SESSION_CHARACTERS = 256
"""Requests that begin with the same text are one session, unless the client names it."""

REFUSED = {
    "min_tokens": "it is not supported",
    "prompt_logprobs": "log-probabilities of the prompt are not supported",
    "stop_token_ids": "it is not supported; use stop",
    "use_beam_search": "replies are sampled",
}

GivenPrompt = str | list[str | int | list[int]]
PROMPT = doc(
    "text, token ids, or a list of either; control tokens in text take effect, but with `suffix`"
)
SUFFIX = doc("fills the gap between prompt and suffix, by the model's fill-in-the-middle tokens")
LOGPROBS = doc("alternatives of every sampled token, up to 20; not with `echo`")
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class CompletionRequest(GuidedFields, kw_only=True):
    """The body."""

    prompt: Annotated[GivenPrompt, PROMPT]
    model: Annotated[str | None, doc("its name or an alias, in any case; others answer 404")] = None
    suffix: Annotated[str | None, SUFFIX] = None
    max_tokens: Annotated[int | None, doc("16 unless given; -1 is all that the context leaves")] = (
        None
    )
    n: Annotated[Choices | None, doc("choices a prompt; 64 in all")] = None
    best_of: Annotated[int | None, doc("the same as `n`; more is refused")] = None
    stream: Annotated[bool | None, doc("events as the text comes")] = None
    stream_options: Annotated[StreamOptions | None, doc("include_usage")] = None
    stop: Annotated[Stops, STOP] = None
    echo: Annotated[bool | None, doc("the prompt's text comes first")] = None
    logprobs: Annotated[Logprobs | None, LOGPROBS] = None
    response_format: Annotated[ResponseFormat | None, doc("as in chat")] = None
    prompt_cache_key: Annotated[str | None, doc("names the session, as in chat")] = None


PARAMETERS = Parameters(
    path="/v1/completions", request=CompletionRequest, no_ops=NO_OPS, refused=REFUSED
)


class CompletionChoice(Struct, frozen=True):
    """One choice to generate, with the text that it echoes."""

    prompt: RawPrompt
    rules: ReplyRules
    echo: str


class CompletionAsk(Struct, frozen=True, kw_only=True):
    """A request in our own terms. `ignored` is what means nothing to us."""

    model: str | None
    choices: tuple[CompletionChoice, ...]
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]


def read_ask(
    body: bytes, headers: Mapping[str, str], defaults: SamplingParams, tokenizer: Tokenizer
) -> CompletionAsk:
    """Decode, check and translate a body.

    Raises:
        InvalidRequest: names the parameter that cannot be honoured.
    """
    asked = decode_body(body, CompletionRequest)
    ignored = PARAMETERS.check(body)
    _refuse_values(asked)
    choices = tuple(_choices(asked, headers, defaults, tokenizer))
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"prompt: there must be 1 to {MAX_CHOICES} choices.", "prompt")
    return CompletionAsk(
        model=asked.model,
        choices=choices,
        stream=bool(asked.stream),
        include_usage=asked.stream_options is not None and asked.stream_options.include_usage,
        ignored=ignored,
    )


def _refuse_values(asked: CompletionRequest) -> None:
    if asked.max_tokens is not None and asked.max_tokens < 1 and asked.max_tokens != -1:
        raise InvalidRequest("max_tokens: must be at least 1, or -1.", "max_tokens")
    if asked.best_of not in (None, 1, asked.n):
        raise InvalidRequest("best_of: must be the same as n.", "best_of")
    if asked.echo and asked.logprobs is not None:
        raise InvalidRequest(
            "logprobs: those of the prompt are not supported; leave out echo.", "logprobs"
        )


def _choices(
    asked: CompletionRequest,
    headers: Mapping[str, str],
    defaults: SamplingParams,
    tokenizer: Tokenizer,
) -> Iterator[CompletionChoice]:
    sampling = sampling_of(asked, defaults, tokenizer.num_real_tokens, asked.logprobs)
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    rules = ReplyRules(
        sampling=sampling,
        max_tokens=None if max_tokens == -1 else max_tokens,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        stop_tokens=gap_ends(tokenizer) if asked.suffix else frozenset(),
        guide=guide_of(content_form(asked, asked.response_format), ToolChoice(), (), False),
        plain=True,
    )
    for given in _prompts(asked.prompt):
        prompt = _prompt(tokenizer, given, asked.suffix)
        text = given if isinstance(given, str) else tokenizer.decode(given)
        raw = RawPrompt(prompt, session_of(headers, asked.prompt_cache_key, _opening(text)))
        for number in range(asked.n or 1):
            yield CompletionChoice(raw, _reseeded(rules, number), text if asked.echo else "")


def _prompts(given: GivenPrompt) -> list[str | list[int]]:
    """One or several."""
    if isinstance(given, str):
        return [given]
    numbers = [item for item in given if isinstance(item, int)]
    if numbers and len(numbers) == len(given):
        return [numbers]
    prompts = [item for item in given if not isinstance(item, int)]
    if len(prompts) != len(given) or len({type(item) for item in prompts}) > 1:
        raise InvalidRequest("prompt: a list must hold texts, token ids or lists of ids.", "prompt")
    return prompts


def _prompt(tokenizer: Tokenizer, given: str | list[int], suffix: str | None) -> Prompt:
    if suffix:
        before = given if isinstance(given, str) else tokenizer.decode(given)
        return gap_prompt(tokenizer, before, suffix)
    if isinstance(given, str):
        return text_prompt(tokenizer, given)
    return token_prompt(tokenizer, given)


def _opening(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text[:SESSION_CHARACTERS]),)


def _reseeded(rules: ReplyRules, number: int) -> ReplyRules:
    """Choices of one prompt must not all be the same."""
    seed = rules.sampling.seed
    if seed is None or number == 0:
        return rules
    sampling = msgspec.structs.replace(rules.sampling, seed=(seed + number) % 2**63)
    return msgspec.structs.replace(rules, sampling=sampling)
