"""Why requests reused what they did, and what a request would reuse: /v1/cache/requests and /plan.

Owns these routes; the plans are cache_plan's, the reading of a body is its dialect's. Event loop.
"""

from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.cache_plan import CachePlan
from daemon.api.conversation import Conversation, RawPrompt
from daemon.api.generations import Generations
from daemon.api.request_body import keys_of, read_body
from daemon.api.service import Service
from daemon.errors import InvalidRequest, UnknownRequest

ReadConversation = Callable[[bytes, Mapping[str, str]], Conversation | RawPrompt]
"""A dialect's reading of a body and its headers: the conversation that it would answer."""

NUM_LATEST = 50


class PlanList(Struct):
    """The body of /v1/cache/requests, the newest first."""

    data: list[CachePlan]
    object: str = "list"


class CacheRoutes:
    """The endpoints, with what they read.

    Args:
        dialects: how to read a body, by the dialect's name.
    """

    def __init__(
        self,
        service: Service,
        generations: Generations,
        dialects: Mapping[str, ReadConversation],
    ) -> None:
        self._service = service
        self._generations = generations
        self._dialects = dialects

    async def requests(self, _: Request) -> Response:
        """The plans of the last requests; without text where several people ask."""
        plans = self._generations.plans.latest(NUM_LATEST)
        if self._service.is_shared:
            plans = [plan.without_text() for plan in plans]
        return _json(PlanList(plans))

    async def request(self, request: Request) -> Response:
        """The plan of one request.

        Raises:
            UnknownRequest: none of that id is remembered.
        """
        request_id = request.path_params["id"]
        plan = self._generations.plans.find(request_id)
        if plan is None:
            raise UnknownRequest(f"No request {request_id!r} is remembered.")
        return _json(plan)

    async def plan(self, request: Request) -> Response:
        """What a body would reuse, without evaluating it.

        The dialect is named by the query's `dialect`, or else told by the body's own keys.

        Raises:
            InvalidRequest: an unknown dialect, or a body that it refuses.
        """
        body = await read_body(request, self._service.limits.max_body_bytes)
        generations = self._generations
        conversation = await generations.on_prompt_thread(
            self._read, body, request.headers, request.query_params.get("dialect")
        )
        plan = await generations.plan(conversation)
        return _json(plan)

    def _read(
        self, body: bytes, headers: Mapping[str, str], dialect: str | None
    ) -> Conversation | RawPrompt:
        name = dialect or dialect_of(body, headers)
        if name not in self._dialects:
            known = ", ".join(self._dialects)
            raise InvalidRequest(f"dialect: {name!r} is not one of {known}.", "dialect")
        return self._dialects[name](body, headers)


def dialect_of(body: bytes, headers: Mapping[str, str]) -> str:
    """The dialect of a body that names none: what it has in place of messages, or the header that
    Anthropic's clients always send."""
    try:
        keys = keys_of(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "chat"
    if "input" in keys:
        return "responses"
    if "prompt" in keys and "messages" not in keys:
        return "completions"
    return "messages" if "anthropic-version" in headers else "chat"


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
