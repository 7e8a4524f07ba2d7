"""How a generation becomes an HTTP answer, in any dialect: a stream of events, or one body.

Owns the order: begin, pieces, end or error; and that a client which goes away cancels the work.
Knows no dialect: a ReplyWriter spells it. Event loop.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from typing import Generic, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from daemon.api.cache_plan import CachePlan
from daemon.api.disconnect import until_disconnect
from daemon.api.sse import EventStream
from daemon.errors import QwendError

logger = logging.getLogger(__name__)

PLAN_HEADER = "x-cache-plan"
"""What the request reuses and why not more, in one line: foreseen in a stream, which begins before
its evaluation, else final."""


P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
R_contra = TypeVar("R_contra", contravariant=True)


class ReplySource(Protocol[P_co, R_co]):
    """A reply on its way, or several that answer one request: pieces, then an outcome."""

    @property
    def id(self) -> str:
        """The request's id."""
        ...

    @property
    def plan(self) -> CachePlan:
        """What it reuses; final once `pieces` is exhausted."""
        ...

    @property
    def outcome(self) -> R_co | None:
        """How it ended; set once `pieces` is exhausted."""
        ...

    def pieces(self) -> AsyncGenerator[P_co, None]:
        """The reply as it comes."""
        ...

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        ...


class ReplyWriter(Protocol[P_contra, R_contra]):
    """Spells one reply in a dialect. Streams are whole events; nothing is sent for b""."""

    def begin(self) -> bytes:
        """What goes out at once, before the engine has begun."""
        ...

    def piece(self, piece: P_contra) -> bytes:
        """The events of a piece; never b"" for one without news, a sign of life."""
        ...

    def end(self, outcome: R_contra) -> bytes:
        """The last events of a reply that came to its end."""
        ...

    def error(self, error: Exception) -> bytes:
        """The last event of a stream that broke."""
        ...

    def whole(self, pieces: Sequence[P_contra], outcome: R_contra) -> bytes:
        """The body of an answer in one piece."""
        ...


def answer(
    source: ReplySource[P, R],
    writer: ReplyWriter[P, R],
    *,
    stream: bool,
    headers: dict[str, str],
) -> "EventStream | WholeAnswer[P, R]":
    """The ASGI response; it closes the source in every case."""
    headers = {"x-request-id": source.id, **headers}
    if stream:
        headers[PLAN_HEADER] = source.plan.header()
        return EventStream(_events(source, writer), source.close, headers)
    return WholeAnswer(source, writer, headers)


class WholeAnswer(Generic[P, R]):
    """An ASGI response that waits for the reply's end, and cancels it when the client goes."""

    def __init__(
        self, source: ReplySource[P, R], writer: ReplyWriter[P, R], headers: dict[str, str]
    ) -> None:
        self._source = source
        self._writer = writer
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; errors are raised before anything is sent."""
        with closing(self._source):
            await until_disconnect(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [piece async for piece in self._source.pieces()]
        assert self._source.outcome is not None
        body = self._writer.whole(pieces, self._source.outcome)
        headers = self._headers | {PLAN_HEADER: self._source.plan.header()}
        response = Response(body, headers=headers, media_type="application/json")
        await response(scope, receive, send)


async def _events(
    source: ReplySource[P, R], writer: ReplyWriter[P, R]
) -> AsyncGenerator[bytes, None]:
    yield writer.begin()
    try:
        async with aclosing(source.pieces()) as pieces:
            async for piece in pieces:
                yield writer.piece(piece)
        assert source.outcome is not None
        yield writer.end(source.outcome)
    except Exception as error:
        if not isinstance(error, QwendError):
            logger.exception("request %s failed", source.id)
        yield writer.error(error)
