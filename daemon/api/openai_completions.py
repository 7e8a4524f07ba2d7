"""POST /v1/completions: OpenAI's dialect of plain text, streamed or in one piece.

Owns the endpoint. The request's meaning is openai_completions_request's, the generations
generation's, the response's form openai_completions_response's. Event loop.
"""

import time
from collections.abc import Mapping

from starlette.requests import Request

from daemon.api.answer import WholeAnswer, answer
from daemon.api.conversation import RawPrompt
from daemon.api.generation import Generation
from daemon.api.generations import Generations
from daemon.api.openai_chat_response import Head
from daemon.api.openai_completions_group import ChoicePiece, CompletionGroup
from daemon.api.openai_completions_request import CompletionAsk, read_ask
from daemon.api.openai_completions_response import CompletionWriter
from daemon.api.parameters import ignored_header
from daemon.api.reply_pieces import Outcome
from daemon.api.request_body import read_body
from daemon.api.service import Service
from daemon.api.sse import EventStream


class Completions:
    """The endpoint, with what it needs."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    async def answer(
        self, request: Request
    ) -> EventStream | WholeAnswer[ChoicePiece, tuple[Outcome, ...]]:
        """Answer one request.

        Raises:
            QwendError: before anything has been sent.
        """
        service = self._service
        body = await read_body(request, service.limits.max_body_bytes)
        ask = await self._generations.on_prompt_thread(self._read, body, request.headers)
        service.check_model(ask.model)
        group = CompletionGroup(await self._start(ask))
        head = Head(f"cmpl-{group.id}", int(time.time()), service.model_name, service.fingerprint)
        echoes = [choice.echo for choice in ask.choices]
        writer = CompletionWriter(head, service.tokenizer, echoes, include_usage=ask.include_usage)
        return answer(group, writer, stream=ask.stream, headers=ignored_header(ask.ignored))

    def conversation(self, body: bytes, headers: Mapping[str, str]) -> RawPrompt:
        """The first prompt of a body; prompt thread.

        Raises:
            InvalidRequest, UnknownModel: as for `answer`.
        """
        ask = self._read(body, headers)
        self._service.check_model(ask.model)
        return ask.choices[0].prompt

    def _read(self, body: bytes, headers: Mapping[str, str]) -> CompletionAsk:
        return read_ask(body, headers, self._service.sampling, self._service.tokenizer)

    async def _start(self, ask: CompletionAsk) -> list[Generation]:
        """All of them, or none."""
        started: list[Generation] = []
        try:
            for choice in ask.choices:
                started.append(await self._generations.start(choice.prompt, choice.rules))
        except BaseException:
            for generation in started:
                generation.close()
            raise
        return started
