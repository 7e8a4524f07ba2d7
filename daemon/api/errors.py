"""Errors as the OpenAI API words them: the one place where the error tree meets HTTP statuses.

Owns the mapping and the JSON shape. Never shows a traceback or an unexpected error's message to a
client. Event loop.
"""

import http
from typing import NamedTuple

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from daemon.errors import (
    DeviceError,
    EngineStopped,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    QwendError,
    RequestError,
    UnknownModel,
    UnknownRequest,
)


class ErrorBody(Struct):
    """What a client reads about an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Struct):
    """The whole body of an error response, and the data of an error event in a stream."""

    error: ErrorBody


class _Kind(NamedTuple):
    status: int
    type: str
    code: str | None


_KINDS: dict[type[QwendError], _Kind] = {
    PromptTooLong: _Kind(400, "invalid_request_error", "context_length_exceeded"),
    UnknownModel: _Kind(404, "invalid_request_error", "model_not_found"),
    UnknownRequest: _Kind(404, "invalid_request_error", "request_not_found"),
    InvalidRequest: _Kind(400, "invalid_request_error", None),
    RequestError: _Kind(400, "invalid_request_error", None),
    Overloaded: _Kind(503, "overloaded_error", "overloaded"),
    EngineStopped: _Kind(503, "server_error", "engine_stopped"),
    DeviceError: _Kind(500, "server_error", "device_error"),
    QwendError: _Kind(500, "server_error", None),
}


def error_envelope(error: QwendError) -> ErrorEnvelope:
    """The body for an error of our tree."""
    kind = _kind(error)
    return ErrorEnvelope(ErrorBody(str(error), kind.type, _param(error), kind.code))


def unexpected_envelope() -> ErrorEnvelope:
    """The body for an error that is our own mistake."""
    message = "The server made an error; its log says more."
    return ErrorEnvelope(ErrorBody(message, "server_error", None, "internal_error"))


def qwend_error_response(_: Request, error: Exception) -> Response:
    """Answer an error of our tree."""
    assert isinstance(error, QwendError)
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    return _response(_kind(error).status, error_envelope(error), headers)


def http_error_response(request: Request, error: Exception) -> Response:
    """Answer an unknown route, a wrong method or a body that is too large."""
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == http.HTTPStatus(error.status_code).phrase:
        detail = f"{detail}: {request.method} {request.url.path}"
    body = ErrorBody(detail, "invalid_request_error", None, None)
    return _response(error.status_code, ErrorEnvelope(body), dict(error.headers or {}))


def unexpected_error_response(_: Request, __: Exception) -> Response:
    """Answer our own mistake; the server logs the traceback."""
    return _response(500, unexpected_envelope(), {})


def _kind(error: QwendError) -> _Kind:
    return next(_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS)


def _param(error: QwendError) -> str | None:
    match error:
        case InvalidRequest(param=param):
            return param
        case PromptTooLong():
            return "messages"
        case UnknownModel():
            return "model"
    return None


def _response(status: int, envelope: ErrorEnvelope, headers: dict[str, str]) -> Response:
    body = msgspec.json.encode(envelope)
    return Response(body, status, headers, media_type="application/json")
