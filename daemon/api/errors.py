"""Errors as OpenAI's and Anthropic's APIs word them: where the error tree meets HTTP statuses.

Owns the mapping and both JSON shapes. Never shows a traceback or an unexpected error's message to
a client. Event loop.
"""

import http
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from daemon.errors import (
    DeviceError,
    EngineStopped,
    InvalidRequest,
    KeyRefused,
    Overloaded,
    PlaceRefused,
    PromptTooLong,
    QwendError,
    RequestError,
    SessionFileError,
    TimedOut,
    TooManyRequests,
    UnknownModel,
    UnknownRequest,
    UnknownSession,
)


class ErrorBody(Struct):
    """What an OpenAI client reads about an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Struct):
    """The whole body of an error response, and the data of an error event in a stream."""

    error: ErrorBody


class AnthropicErrorBody(Struct):
    """What an Anthropic client reads about an error."""

    type: str
    message: str


class AnthropicErrorEnvelope(Struct):
    """The same for Anthropic clients."""

    error: AnthropicErrorBody
    type: Literal["error"] = "error"


class _Kind(NamedTuple):
    status: int
    type: str
    code: str | None
    anthropic_type: str


_INVALID = "invalid_request_error"
_KINDS: dict[type[QwendError], _Kind] = {
    PromptTooLong: _Kind(400, _INVALID, "context_length_exceeded", _INVALID),
    UnknownModel: _Kind(404, _INVALID, "model_not_found", "not_found_error"),
    UnknownRequest: _Kind(404, _INVALID, "request_not_found", "not_found_error"),
    UnknownSession: _Kind(404, _INVALID, "session_not_found", "not_found_error"),
    SessionFileError: _Kind(400, _INVALID, "session_file_refused", _INVALID),
    InvalidRequest: _Kind(400, _INVALID, None, _INVALID),
    RequestError: _Kind(400, _INVALID, None, _INVALID),
    KeyRefused: _Kind(401, _INVALID, "invalid_api_key", "authentication_error"),
    PlaceRefused: _Kind(403, _INVALID, "not_let_in", "permission_error"),
    TooManyRequests: _Kind(429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    Overloaded: _Kind(503, "overloaded_error", "overloaded", "overloaded_error"),
    TimedOut: _Kind(504, "server_error", "timeout", "timeout_error"),
    EngineStopped: _Kind(503, "server_error", "engine_stopped", "api_error"),
    DeviceError: _Kind(500, "server_error", "device_error", "api_error"),
    QwendError: _Kind(500, "server_error", None, "api_error"),
}

_ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                    413: "request_too_large", 429: "rate_limit_error"}  # fmt: skip

_UNEXPECTED = "The server made an error; its log says more."


def error_body(error: Exception) -> ErrorBody:
    """An error in OpenAI's words; one that is our own mistake is not described."""
    if not isinstance(error, QwendError):
        return ErrorBody(_UNEXPECTED, "server_error", None, "internal_error")
    kind = _kind(error)
    return ErrorBody(str(error), kind.type, _param(error), kind.code)


def openai_error(error: Exception) -> bytes:
    """A whole body in OpenAI's words."""
    return msgspec.json.encode(ErrorEnvelope(error_body(error)))


def anthropic_error(error: Exception) -> bytes:
    """A whole body in Anthropic's words."""
    if not isinstance(error, QwendError):
        return _anthropic("api_error", _UNEXPECTED)
    if isinstance(error, PromptTooLong):
        found, limit = error.num_prompt_tokens, error.context_length
        return _anthropic(_INVALID, f"prompt is too long: {found} tokens > {limit} maximum")
    return _anthropic(_kind(error).anthropic_type, str(error))


def qwend_error_response(request: Request, error: Exception) -> Response:
    """Answer an error of our tree."""
    assert isinstance(error, QwendError)
    headers = {}
    if isinstance(error, KeyRefused):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    body = anthropic_error(error) if speaks_anthropic(request) else openai_error(error)
    return _response(_status(request, error), body, headers)


def http_error_response(request: Request, error: Exception) -> Response:
    """Answer an unknown route, a wrong method or a body that is too large."""
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == http.HTTPStatus(error.status_code).phrase:
        detail = f"{detail}: {request.method} {request.url.path}"
    if speaks_anthropic(request):
        body = _anthropic(_ANTHROPIC_TYPES.get(error.status_code, _INVALID), detail)
    else:
        body = msgspec.json.encode(ErrorEnvelope(ErrorBody(detail, _INVALID, None, None)))
    return _response(error.status_code, body, dict(error.headers or {}))


def unexpected_error_response(request: Request, error: Exception) -> Response:
    """Answer our own mistake; the server logs the traceback."""
    body = anthropic_error(error) if speaks_anthropic(request) else openai_error(error)
    return _response(500, body, {})


def speaks_anthropic(request: Request) -> bool:
    """Whether the client expects Anthropic's shapes."""
    return request.url.path.startswith("/v1/messages") or "anthropic-version" in request.headers


def _kind(error: QwendError) -> _Kind:
    return next(_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS)


def _status(request: Request, error: QwendError) -> int:
    """Anthropic's own status for overload is 529."""
    status = _kind(error).status
    overloaded = isinstance(error, Overloaded) and status == 503
    return 529 if overloaded and speaks_anthropic(request) else status


def _param(error: QwendError) -> str | None:
    match error:
        case InvalidRequest(param=param):
            return param
        case PromptTooLong():
            return "messages"
        case UnknownModel():
            return "model"
    return None


def _anthropic(kind: str, message: str) -> bytes:
    return msgspec.json.encode(AnthropicErrorEnvelope(AnthropicErrorBody(kind, message)))


def _response(status: int, body: bytes, headers: dict[str, str]) -> Response:
    return Response(body, status, headers, media_type="application/json")
