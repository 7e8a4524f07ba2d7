"""How a generation becomes an HTTP answer, in any dialect: a stream of events, or one body.

Owns the order: begin, pieces, end or error; and that a client which goes away cancels the work.
Knows no dialect: a ReplyWriter spells it. Event loop.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from daemon.api.disconnect import until_disconnect
from daemon.api.generation import Generation, Outcome, Piece
from daemon.api.sse import EventStream
from daemon.errors import QwendError

logger = logging.getLogger(__name__)

PLAN_HEADER = "x-cache-plan"
"""What the request reuses and why not more, in one line: foreseen in a stream, which begins before
its evaluation, else final."""


class ReplyWriter(Protocol):
    """Spells one reply in a dialect. Streams are whole events; nothing is sent for b""."""

    def begin(self) -> bytes:
        """What goes out at once, before the engine has begun."""
        ...

    def piece(self, piece: Piece) -> bytes:
        """The events of a piece; never b"" for one without news, a sign of life."""
        ...

    def end(self, outcome: Outcome) -> bytes:
        """The last events of a reply that came to its end."""
        ...

    def error(self, error: Exception) -> bytes:
        """The last event of a stream that broke."""
        ...

    def whole(self, pieces: Sequence[Piece], outcome: Outcome) -> bytes:
        """The body of an answer in one piece."""
        ...


def answer(
    generation: Generation, writer: ReplyWriter, *, stream: bool, headers: dict[str, str]
) -> "EventStream | WholeAnswer":
    """The ASGI response; it closes the generation in every case."""
    headers = {"x-request-id": generation.id, **headers}
    if stream:
        headers[PLAN_HEADER] = generation.plan.header()
        return EventStream(_events(generation, writer), generation.close, headers)
    return WholeAnswer(generation, writer, headers)


class WholeAnswer:
    """An ASGI response that waits for the reply's end, and cancels it when the client goes."""

    def __init__(
        self, generation: Generation, writer: ReplyWriter, headers: dict[str, str]
    ) -> None:
        self._generation = generation
        self._writer = writer
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; errors are raised before anything is sent."""
        with closing(self._generation):
            await until_disconnect(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [piece async for piece in self._generation.pieces()]
        assert self._generation.outcome is not None
        body = self._writer.whole(pieces, self._generation.outcome)
        headers = self._headers | {PLAN_HEADER: self._generation.outcome.plan.header()}
        response = Response(body, headers=headers, media_type="application/json")
        await response(scope, receive, send)


async def _events(generation: Generation, writer: ReplyWriter) -> AsyncGenerator[bytes, None]:
    yield writer.begin()
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                yield writer.piece(piece)
        assert generation.outcome is not None
        yield writer.end(generation.outcome)
    except Exception as error:
        if not isinstance(error, QwendError):
            logger.exception("request %s failed", generation.id)
        yield writer.error(error)
