"""POST /v1/chat/completions: OpenAI's chat dialect, streamed or in one piece.

Owns the endpoint. The request's meaning is openai_chat_request's, the generation generation's,
the response's form openai_chat_response's. Event loop.
"""

import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, closing

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from daemon.api.disconnect import until_disconnect
from daemon.api.errors import error_envelope, unexpected_envelope
from daemon.api.generation import Conversation, Generation, Generations
from daemon.api.openai_chat_request import Ask, read_ask
from daemon.api.openai_chat_response import ChunkWriter, Head, completion_body
from daemon.api.request_body import read_body
from daemon.api.service import Service
from daemon.api.sse import DONE, EventStream, frame
from daemon.errors import QwendError

logger = logging.getLogger(__name__)

IGNORED_HEADER = "x-qwend-ignored"
"""Names the body's keys that mean nothing to this server."""


PLAN_HEADER = "x-cache-plan"
"""What the request reuses and why not more, in one line: foreseen in a stream, which begins before
its evaluation, else final."""


class ChatCompletions:
    """The endpoint, with what it needs."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    async def answer(self, request: Request) -> "EventStream | WholeAnswer":
        """Answer one request.

        Raises:
            QwendError: before anything has been sent.
        """
        service = self._service
        body = await read_body(request, service.limits.max_body_bytes)
        ask = await self._generations.on_prompt_thread(
            read_ask, body, request.headers, service.sampling, service.engine.info
        )
        service.check_model(ask.model)
        generation = await self._generations.start(ask.conversation, ask.rules)
        headers = {"x-request-id": generation.id, PLAN_HEADER: generation.plan.header()}
        if ask.ignored:
            headers[IGNORED_HEADER] = _printable(ask.ignored)
        head = self._head(generation)
        if ask.stream:
            writer = ChunkWriter(head, service.tokenizer, ask.include_usage)
            return EventStream(_frames(generation, writer, ask), generation.close, headers)
        return WholeAnswer(generation, head, service, headers, ask.explain)

    def conversation(self, body: bytes, headers: Mapping[str, str]) -> Conversation:
        """What a body asks to be answered; prompt thread.

        Raises:
            InvalidRequest, UnknownModel: as for `answer`.
        """
        service = self._service
        ask = read_ask(body, headers, service.sampling, service.engine.info)
        service.check_model(ask.model)
        return ask.conversation

    def _head(self, generation: Generation) -> Head:
        model = self._service.engine.info.model_name
        created = int(time.time())
        return Head(f"chatcmpl-{generation.id}", created, model, self._service.fingerprint)


class WholeAnswer:
    """An ASGI response that waits for the reply's end, and cancels it when the client goes."""

    def __init__(
        self,
        generation: Generation,
        head: Head,
        service: Service,
        headers: dict[str, str],
        explain: bool,
    ) -> None:
        self._generation = generation
        self._head = head
        self._service = service
        self._headers = headers
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; errors are raised before anything is sent."""
        with closing(self._generation):
            await until_disconnect(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [piece async for piece in self._generation.pieces()]
        assert self._generation.outcome is not None
        plan = self._generation.plan
        body = completion_body(
            self._head,
            pieces,
            self._generation.outcome,
            self._service.tokenizer,
            plan if self._explain else UNSET,
        )
        headers = self._headers | {PLAN_HEADER: plan.header()}
        response = Response(body, headers=headers, media_type="application/json")
        await response(scope, receive, send)


async def _frames(
    generation: Generation, writer: ChunkWriter, ask: Ask
) -> AsyncGenerator[bytes, None]:
    yield frame(writer.first())
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                yield b"".join(map(frame, writer.piece(piece)))
    except QwendError as error:
        yield frame(msgspec.json.encode(error_envelope(error)))
        return
    except Exception:
        logger.exception("request %s failed", generation.id)
        yield frame(msgspec.json.encode(unexpected_envelope()))
        return
    assert generation.outcome is not None
    yield frame(writer.last(generation.outcome.reason))
    if ask.include_usage or ask.explain:
        plan = generation.plan if ask.explain else UNSET
        yield frame(writer.usage(generation.outcome, plan))
    yield DONE


def _printable(names: tuple[str, ...]) -> str:
    return ", ".join(name if name.isascii() and name.isprintable() else "?" for name in names)[
        :1000
    ]
