"""/v1/responses: OpenAI's responses dialect: answer, fetch, delete, count.

Owns the endpoints. The request's meaning is openai_responses_request's, the generation
generation's, the response's form openai_responses_stream's. Event loop.
"""

import time
from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.answer import WholeAnswer, answer
from daemon.api.conversation import Conversation
from daemon.api.generations import Generations
from daemon.api.openai_chat_messages import arguments_of
from daemon.api.openai_responses_items import CUSTOM_INPUT
from daemon.api.openai_responses_request import ResponsesAsk, read_ask
from daemon.api.openai_responses_response import (
    CustomToolCallItem,
    FunctionCallItem,
    ResponseObject,
    response_object,
)
from daemon.api.openai_responses_store import ResponseStore, StoredResponse
from daemon.api.openai_responses_stream import ResponseWriter, reply_text
from daemon.api.parameters import ignored_header
from daemon.api.reply_pieces import Outcome, Piece
from daemon.api.request_body import read_body
from daemon.api.service import Service
from daemon.api.sse import EventStream
from daemon.errors import InvalidRequest, UnknownRequest
from daemon.text.messages import Message, ToolCall


class Responses:
    """The endpoints, with what they need."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations
        self._store = ResponseStore()
        generations.when_forgetting(self._store.forget)

    async def answer(self, request: Request) -> EventStream | WholeAnswer[Piece, Outcome]:
        """Answer one request.

        Raises:
            QwendError: before anything has been sent.
        """
        ask, num_bytes = await self._ask(request)
        history = self._history(ask)
        generation = await self._generations.start(ask.conversation(history), ask.rules)
        response = response_object(
            f"resp_{generation.id}",
            int(time.time()),
            self._service.model_name,
            ask.asked,
            temperature=ask.rules.sampling.temperature,
            top_p=ask.rules.sampling.top_p,
        )

        def keep(done: ResponseObject) -> None:
            if ask.asked.store is not False and not generation.is_revoked:
                self._keep(done, (*history, *ask.messages), ask, num_bytes)

        writer = ResponseWriter(
            response,
            ask.tools.names,
            summarises=ask.summarises,
            seals=ask.seals,
            on_end=keep,
        )
        stream = bool(ask.asked.stream)
        return answer(generation, writer, stream=stream, headers=ignored_header(ask.ignored))

    async def fetch(self, request: Request) -> Response:
        """A stored response.

        Raises:
            UnknownRequest: there is none of that id.
            InvalidRequest: it is asked for as a stream.
        """
        if request.query_params.get("stream", "false").casefold() not in ("false", "0", ""):
            raise InvalidRequest("stream: a stored response comes in one piece.", "stream")
        response_id = request.path_params["id"]
        found = self._store.find(response_id)
        if found is None:
            raise _unknown(response_id)
        return Response(found.body, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        """Forget a response.

        Raises:
            UnknownRequest: there is none of that id.
        """
        response_id = request.path_params["id"]
        if not self._store.delete(response_id):
            raise _unknown(response_id)
        gone = {"id": response_id, "object": "response", "deleted": True}
        return Response(msgspec.json.encode(gone), media_type="application/json")

    async def count_tokens(self, request: Request) -> Response:
        """How long the prompt would be, in tokens.

        Raises:
            QwendError: as for `answer`.
        """
        ask, _ = await self._ask(request)
        conversation = ask.conversation(self._history(ask))
        num_tokens = await self._generations.count_tokens(conversation)
        counted = {"object": "response.input_tokens", "input_tokens": num_tokens}
        return Response(msgspec.json.encode(counted), media_type="application/json")

    def conversation(self, body: bytes, headers: Mapping[str, str]) -> Conversation:
        """What a body asks to be answered; prompt thread.

        Raises:
            InvalidRequest, UnknownModel: as for `answer`.
        """
        ask = self._read(body, headers)
        self._service.check_model(ask.asked.model)
        return ask.conversation(self._history(ask))

    def _read(self, body: bytes, headers: Mapping[str, str]) -> ResponsesAsk:
        return read_ask(body, headers, self._service.sampling, self._service.engine.info)

    async def _ask(self, request: Request) -> tuple[ResponsesAsk, int]:
        body = await read_body(request, self._service.limits.max_body_bytes)
        ask = await self._generations.on_prompt_thread(self._read, body, request.headers)
        self._service.check_model(ask.asked.model)
        return ask, len(body)

    def _history(self, ask: ResponsesAsk) -> tuple[Message, ...]:
        previous = ask.asked.previous_response_id
        if previous is None:
            return ()
        found = self._store.find(previous)
        if found is None:
            raise InvalidRequest(
                f"previous_response_id: there is no response {previous!r}; they are kept in "
                "memory while the daemon runs. Send the whole conversation.",
                "previous_response_id",
            )
        return found.messages

    def _keep(
        self,
        response: ResponseObject,
        messages: tuple[Message, ...],
        ask: ResponsesAsk,
        num_bytes: int,
    ) -> None:
        body = msgspec.json.encode(response)
        whole = (*messages, _reply(response, ask))
        kept = StoredResponse(body, whole, num_bytes + len(body), ask.session)
        self._store.keep(response.id, kept)


def _reply(response: ResponseObject, ask: ResponsesAsk) -> Message:
    """The response as the next one's history shows it."""
    reasoning, content = reply_text(response)
    names = ask.tools.names
    calls = []
    for item in response.output:
        if isinstance(item, FunctionCallItem):
            name = names.shown(item.name, item.namespace or None)
            calls.append(ToolCall(item.call_id, name, arguments_of(item.arguments)))
        elif isinstance(item, CustomToolCallItem):
            name = names.shown(item.name, item.namespace or None)
            calls.append(ToolCall(item.call_id, name, {CUSTOM_INPUT: item.input}))
    return Message(
        role="assistant", content=content, reasoning=reasoning or None, tool_calls=tuple(calls)
    )


def _unknown(response_id: str) -> UnknownRequest:
    return UnknownRequest(
        f"Response {response_id!r} not found: responses are kept in memory while the daemon runs."
    )
