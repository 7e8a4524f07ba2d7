"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect.

Owns the endpoints. The request's meaning is anthropic_messages_request's, the generation
generation's, the response's form anthropic_messages_response's. Event loop.
"""

from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.answer import WholeAnswer, answer
from daemon.api.anthropic_messages_request import MessagesAsk, read_ask
from daemon.api.anthropic_messages_response import InputTokens, MessageWriter
from daemon.api.conversation import Conversation
from daemon.api.generations import Generations
from daemon.api.parameters import ignored_header
from daemon.api.reply_pieces import Outcome, Piece
from daemon.api.request_body import read_body
from daemon.api.service import Service
from daemon.api.sse import EventStream


class Messages:
    """The endpoints, with what they need."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    async def answer(self, request: Request) -> EventStream | WholeAnswer[Piece, Outcome]:
        """Answer one request.

        Raises:
            QwendError: before anything has been sent.
        """
        ask = await self._ask(request, counting=False)
        generation = await self._generations.start(ask.conversation, ask.rules)
        writer = MessageWriter(
            f"msg_{generation.id}",
            self._service.model_name,
            generation.num_prompt_tokens,
            shows_thinking=ask.shows_thinking,
            diagnoses=ask.diagnoses,
            follows=ask.follows,
        )
        headers = ignored_header(ask.ignored) | {"request-id": f"req_{generation.id}"}
        return answer(generation, writer, stream=ask.stream, headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """How long the prompt would be, in tokens.

        Raises:
            QwendError: as for `answer`.
        """
        ask = await self._ask(request, counting=True)
        num_tokens = await self._generations.count_tokens(ask.conversation)
        return Response(
            msgspec.json.encode(InputTokens(num_tokens)),
            headers=ignored_header(ask.ignored),
            media_type="application/json",
        )

    def conversation(self, body: bytes, headers: Mapping[str, str]) -> Conversation:
        """What a body asks to be answered; prompt thread.

        Raises:
            InvalidRequest, UnknownModel: as for `answer`.
        """
        ask = read_ask(body, headers, self._service.sampling, counting=True)
        self._service.check_model(ask.model)
        return ask.conversation

    async def _ask(self, request: Request, *, counting: bool) -> MessagesAsk:
        service = self._service
        body = await read_body(request, service.limits.max_body_bytes)

        def read() -> MessagesAsk:
            return read_ask(body, request.headers, service.sampling, counting=counting)

        ask = await self._generations.on_prompt_thread(read)
        service.check_model(ask.model)
        return ask
