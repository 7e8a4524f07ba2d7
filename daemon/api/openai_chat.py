"""POST /v1/chat/completions: OpenAI's chat dialect, streamed or in one piece.

Owns the endpoint. The request's meaning is openai_chat_request's, the generation generation's,
the response's form openai_chat_response's. Event loop.
"""

import time
from collections.abc import Mapping

from starlette.requests import Request

from daemon.api.answer import WholeAnswer, answer
from daemon.api.conversation import Conversation
from daemon.api.generation import Generation
from daemon.api.generations import Generations
from daemon.api.openai_chat_request import read_ask
from daemon.api.openai_chat_response import ChatWriter, Head
from daemon.api.parameters import ignored_header
from daemon.api.reply_pieces import Outcome, Piece
from daemon.api.request_body import read_body
from daemon.api.service import Service
from daemon.api.sse import EventStream


class ChatCompletions:
    """The endpoint, with what it needs."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    async def answer(self, request: Request) -> EventStream | WholeAnswer[Piece, Outcome]:
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
        writer = ChatWriter(
            self._head(generation),
            service.tokenizer,
            include_usage=ask.include_usage,
            progress=ask.rules.report_progress,
            explain=ask.explain,
        )
        return answer(generation, writer, stream=ask.stream, headers=ignored_header(ask.ignored))

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
