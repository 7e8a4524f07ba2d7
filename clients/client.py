"""A small Python client of a qwend server: chat as it streams, models, statistics.

Owns the HTTP of one server. Imports nothing of the daemon: whatever speaks the same API can be on
the other side. Runs on the caller's thread.
"""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx
from msgspec import Struct

CONNECT_TIMEOUT_S = 5.0
DEFAULT_URL = "http://127.0.0.1:8080"
SILENCE_TIMEOUT_S = 300.0


class ClientError(Exception):
    """Base of what can go wrong between client and server; one line for people."""


class ServerUnreachable(ClientError):
    """Nobody answers at the URL, or the connection broke."""


class ServerRefused(ClientError):
    """The server answered with an error.

    Args:
        status: the HTTP status; 0 for an error in the middle of a stream.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Usage(Struct, frozen=True):
    """Tokens of one answer; `num_cached` of the prompt were not evaluated again."""

    num_prompt: int
    num_cached: int
    num_reply: int


class CallPart(Struct, frozen=True):
    """A part of a tool call; id and name come with the first part of an index."""

    index: int
    id: str
    name: str
    arguments: str


class Part(Struct, frozen=True):
    """What one event of a stream brought; a sign of life has nothing in it."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


class Client:
    """One server. Use it as a context manager, or `close` it.

    Args:
        url: such as http://127.0.0.1:8080; http:// may be left out, a trailing /v1 is taken off.
    """

    def __init__(
        self, url: str, *, api_key: str = "", transport: httpx.BaseTransport | None = None
    ) -> None:
        url = url if "://" in url else f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout, transport=transport
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ServerUnreachable(f"{url!r} is not a URL: {error}.") from error

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> dict[str, Any]:
        """The server's state; answers while it loads and stops too.

        Raises:
            ClientError: as for every method.
        """
        return self._get("/health", accept=(200, 503))

    def models(self) -> list[dict[str, Any]]:
        """The models that are served, with their context lengths."""
        models: list[dict[str, Any]] = self._get("/v1/models")["data"]
        return models

    def stats(self) -> dict[str, Any]:
        """How much of the prompts was reused, and what the store holds."""
        return self._get("/v1/cache/stats")

    def plans(self) -> list[dict[str, Any]]:
        """What the last requests reused and why not more, the newest first."""
        plans: list[dict[str, Any]] = self._get("/v1/cache/requests")["data"]
        return plans

    def plan(self, request_id: str) -> dict[str, Any]:
        """What one request reused and why not more."""
        return self._get(f"/v1/cache/requests/{quote(request_id)}")

    def dry_run(self, body: bytes, dialect: str | None = None) -> dict[str, Any]:
        """What a request's body would reuse."""
        query = {"dialect": dialect} if dialect else {}
        return self._send("POST", "/v1/cache/plan", params=query, content=body)

    def session(self, method: str, name: str, **content: Any) -> dict[str, Any]:
        """Ask for something of a stored session, by its id or name."""
        return self._send(method, f"/v1/cache/sessions/{quote(name)}", **content)

    def import_session(self, path: Path, session: str | None = None) -> dict[str, Any]:
        """Send an exported session; what it is there."""
        query = {"session": session} if session else {}
        try:
            file = path.open("rb")
        except OSError as error:
            raise ClientError(f"{path}: {error.strerror}.") from error
        with file:
            return self._send("POST", "/v1/cache/sessions/import", params=query, content=file)

    def export(self, name: str) -> Generator[bytes]:
        """A session as a file, piece by piece."""
        path = f"/v1/cache/sessions/{quote(name)}/export"
        try:
            with self._http.stream("GET", path) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                yield from response.iter_bytes()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generator[Part]:
        """Stream an answer. Closing the generator ends the server's work.

        Args:
            options: further parameters of /v1/chat/completions.
        """
        body = {
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                yield from _parts(response.iter_lines())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _get(self, path: str, accept: Sequence[int] = (200,)) -> dict[str, Any]:
        return self._send("GET", path, accept)

    def _send(
        self, method: str, path: str, accept: Sequence[int] = (200, 201), **content: Any
    ) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if response.status_code not in accept:
            raise _refusal(response)
        try:
            body: dict[str, Any] = response.json()
        except json.JSONDecodeError as error:
            raise ServerUnreachable(f"{self.url} is no qwend server: no JSON.") from error
        return body

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        if isinstance(error, httpx.ConnectError):
            return ServerUnreachable(
                f"No server answers at {self.url}. Start one with `qwend serve`."
            )
        reason = str(error) or type(error).__name__
        return ServerUnreachable(f"The connection to {self.url} failed: {reason}.")


def _parts(lines: Iterator[str]) -> Iterator[Part]:
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield _part(json.loads(data))
    raise ServerUnreachable("The server broke off the answer.")


def _part(event: dict[str, Any]) -> Part:
    if event.get("error"):
        raise ServerRefused(str(event["error"].get("message", event["error"])), 0)
    usage = _usage(event.get("usage"))
    if not event.get("choices"):
        return Part(usage=usage)
    choice = event["choices"][0]
    delta = choice.get("delta") or {}
    return Part(
        content=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        calls=tuple(_call(call) for call in delta.get("tool_calls") or ()),
        finish_reason=choice.get("finish_reason"),
        usage=usage,
    )


def _call(call: dict[str, Any]) -> CallPart:
    function = call.get("function") or {}
    return CallPart(
        call.get("index", 0),
        call.get("id") or "",
        function.get("name") or "",
        function.get("arguments") or "",
    )


def _usage(usage: dict[str, Any] | None) -> Usage | None:
    if usage is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        usage["prompt_tokens"], details.get("cached_tokens") or 0, usage["completion_tokens"]
    )


def _refusal(response: httpx.Response) -> ServerRefused:
    try:
        message = str(response.json()["error"]["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        message = f"The server answered {response.status_code} {response.reason_phrase}."
    return ServerRefused(message, response.status_code)
