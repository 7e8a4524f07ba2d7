"""GET /openapi.json: every route of the application, described from its Structs.

Owns the list of operations; the form of bodies is msgspec's reading of the Structs. Event loop.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.anthropic_messages_request import MessagesRequest
from daemon.api.anthropic_messages_response import InputTokens, MessageOut
from daemon.api.cache_plan import CachePlan
from daemon.api.cache_routes import PlanList
from daemon.api.errors import AnthropicErrorEnvelope, ErrorEnvelope
from daemon.api.llama_server import (
    Content,
    Detokenize,
    Props,
    Rendered,
    Slot,
    Tokenize,
    Tokens,
)
from daemon.api.models import Model, ModelList
from daemon.api.openai_chat_request import ChatRequest
from daemon.api.openai_chat_response import ChatCompletion, ChatCompletionChunk
from daemon.api.openai_completions_request import CompletionRequest
from daemon.api.openai_completions_response import TextCompletion
from daemon.api.openai_responses_request import ResponsesRequest
from daemon.api.openai_responses_response import ResponseObject
from daemon.api.refused_routes import REFUSED
from daemon.api.status import CacheStats, Health

PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
PLACE = "#/components/schemas/{name}"


class Operation(Struct, frozen=True, kw_only=True):
    """A method of a path. Without `answer` the body is described in words alone."""

    method: str
    path: str
    summary: str
    body: Any = None
    answer: Any = None
    events: Any = None


def _get(path: str, summary: str, answer: Any = None) -> Operation:
    return Operation(method="get", path=path, summary=summary, answer=answer)


def _post(
    path: str, summary: str, body: Any = None, answer: Any = None, events: Any = None
) -> Operation:
    return Operation(
        method="post", path=path, summary=summary, body=body, answer=answer, events=events
    )


SESSION = "/v1/cache/sessions/{name:path}"
OPERATIONS = (
    *(_post(f"{version}/chat/completions", "OpenAI's chat", ChatRequest, ChatCompletion,
            ChatCompletionChunk) for version in ("/v1", "")),
    *(_post(f"{version}/completions", "Plain text", CompletionRequest, TextCompletion,
            TextCompletion) for version in ("/v1", "")),
    _post("/v1/responses", "OpenAI's responses", ResponsesRequest, ResponseObject, dict),
    _post("/v1/responses/input_tokens", "Length of a prompt", ResponsesRequest, InputTokens),
    _get("/v1/responses/{id}", "A stored response", ResponseObject),
    Operation(method="delete", path="/v1/responses/{id}", summary="Forget a response",
              answer=dict[str, Any]),
    _post("/v1/messages", "Anthropic's messages", MessagesRequest, MessageOut, dict),
    _post("/v1/messages/count_tokens", "Length of a prompt", MessagesRequest, InputTokens),
    *(_get(f"{version}/models", "The model that is served", ModelList)
      for version in ("/v1", "")),
    _get("/v1/models/{model:path}", "The same, by name", Model),
    _get("/v1/cache/stats", "How much was reused", CacheStats),
    _get("/v1/cache/requests", "Why the last requests reused no more", PlanList),
    _get("/v1/cache/requests/{id}", "Why one request reused no more", CachePlan),
    _post("/v1/cache/plan", "What a body of any dialect would reuse", dict[str, Any], CachePlan),
    _get("/v1/cache/sessions", "What the store holds, by session"),
    _post("/v1/cache/sessions/import", "Take in an exported session"),
    _get(f"{SESSION}/export", "A session as a file"),
    _post(f"{SESSION}/fork", "A session of its own from here on"),
    _get(SESSION, "One session"),
    Operation(method="patch", path=SESSION, summary="Title and pins"),
    Operation(method="delete", path=SESSION, summary="Forget a session"),
    _get("/", "Who answers"),
    _get("/api/hello", "Who answers"),
    _get("/health", "Whether requests are taken", Health),
    _get("/v1/health", "Whether requests are taken", Health),
    _get("/metrics", "Counters, for Prometheus"),
    _get("/openapi.json", "This description"),
    _get("/props", "llama-server's facts", Props),
    _get("/slots", "llama-server's slots", list[Slot]),
    _post("/slots/{id}", "llama-server's slot files"),
    _post("/tokenize", "Text to token ids", Tokenize, Tokens),
    _post("/detokenize", "Token ids to text", Detokenize, Content),
    _post("/apply-template", "A chat as the model sees it", ChatRequest, Rendered),
    *(Operation(method=method, path=path, summary=f"Refused: {why}")
      for path, why in REFUSED.items() for method in ("get", "post")),
)  # fmt: skip


async def openapi(_: Request) -> Response:
    """The description."""
    return Response(msgspec.json.encode(description()), media_type="application/json")


def description() -> dict[str, Any]:
    """OpenAPI 3.1, for this version of the source."""
    kinds = [kind for operation in OPERATIONS for kind in _kinds(operation)]
    errors = (ErrorEnvelope, AnthropicErrorEnvelope)
    schemas, components = msgspec.json.schema_components([*kinds, *errors], ref_template=PLACE)
    found = dict(zip(map(repr, [*kinds, *errors]), schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        path = PARAMETER.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method] = _described(operation, found)
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwend", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }


def _kinds(operation: Operation) -> Iterator[Any]:
    given = (operation.body, operation.answer, operation.events)
    yield from (kind for kind in given if kind is not None)


def _described(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    """One operation; errors come in the shape of the dialect."""
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": schemas[repr(operation.answer)]}
    if operation.events is not None:
        content["text/event-stream"] = {"schema": schemas[repr(operation.events)]}
    is_anthropic = operation.path.startswith("/v1/messages")
    envelope = AnthropicErrorEnvelope if is_anthropic else ErrorEnvelope
    error = {"application/json": {"schema": schemas[repr(envelope)]}}
    answered = {"description": "Answered", **({"content": content} if content else {})}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in PARAMETER.findall(operation.path)
        ],
        "responses": {
            "200": answered,
            "4XX": {"description": "Refused; the error names the parameter", "content": error},
            "5XX": {"description": "Busy, stopped or failed", "content": error},
        },
    }
    if operation.body is not None:
        body = {"application/json": {"schema": schemas[repr(operation.body)]}}
        described["requestBody"] = {"required": True, "content": body}
    return described
