"""What tools of llama-server's users ask for: /props, /slots, /tokenize, /detokenize,
/apply-template.

Owns their shapes. Shows no text of any prompt. Event loop; text is encoded on the prompt thread.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.conversation import Conversation
from daemon.api.generation import Generation
from daemon.api.generations import Generations
from daemon.api.request_body import S, decode_body, read_body
from daemon.api.service import Service
from daemon.errors import InvalidRequest

ReadConversation = Callable[[bytes, Mapping[str, str]], Conversation]
"""Reads a body of /v1/chat/completions, on the prompt thread."""


class Tokenize(Struct, kw_only=True):
    """`parse_special` reads control tokens in the text as such; none is ever added."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class TokenPiece(Struct):
    """A token with its text, or with its bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class Tokens(Struct):
    """The answer of /tokenize."""

    tokens: Sequence[int | TokenPiece]


class Detokenize(Struct):
    """Token ids."""

    tokens: list[Annotated[int, Meta(ge=0)]]


class Content(Struct):
    """The answer of /detokenize."""

    content: str


class Rendered(Struct):
    """The answer of /apply-template."""

    prompt: str


class Slot(Struct, kw_only=True):
    """A place for one sequence. Whatever llama-server shows of the text is left out."""

    id: int
    id_task: int
    n_ctx: int
    speculative: bool = False
    is_processing: bool
    n_prompt_tokens: int = 0
    n_prompt_tokens_processed: int = 0
    n_prompt_tokens_cache: int = 0
    params: dict[str, Any]
    next_token: list[dict[str, int | bool]]


class Props(Struct, kw_only=True):
    """The answer of /props."""

    default_generation_settings: dict[str, Any]
    total_slots: int
    model_alias: str
    model_path: str
    modalities: dict[str, bool]
    chat_template: str
    chat_template_caps: dict[str, bool]
    bos_token: str = ""
    eos_token: str
    build_info: str
    endpoint_slots: bool = True
    endpoint_props: bool = False
    endpoint_metrics: bool = True
    webui: bool = False
    is_sleeping: bool = False


class LlamaServer:
    """The endpoints, with what they read."""

    def __init__(
        self, service: Service, generations: Generations, read_conversation: ReadConversation
    ) -> None:
        self._service = service
        self._generations = generations
        self._read_conversation = read_conversation

    async def props(self, _: Request) -> Response:
        """What is served, and with which defaults."""
        service, info = self._service, self._service.engine.info
        settings = {"n_ctx": info.context_length, "params": self._params(), "speculative": False}
        body = Props(
            default_generation_settings=settings,
            total_slots=info.max_sequences,
            model_alias=info.model_name,
            model_path=service.facts.path,
            modalities={"vision": False, "audio": False},
            chat_template=service.facts.chat_template,
            chat_template_caps={
                "supports_tools": True,
                "supports_tool_calls": True,
                "supports_parallel_tool_calls": True,
                "supports_system_role": True,
                "supports_preserve_reasoning": True,
            },
            eos_token=service.tokenizer.decode([min(service.tokenizer.stop_tokens)]),
            build_info=f"qwend {service.version}",
        )
        return _json(body)

    async def slots(self, request: Request) -> Response:
        """Each place with the reply that the engine works on there; who waits has none.

        Raises:
            HTTPException: 503, with `fail_on_no_slot`, while none is free.
        """
        held = self._generations.slots.held()
        numbers = range(self._num_slots)
        if request.query_params.get("fail_on_no_slot") and held.keys() >= set(numbers):
            raise HTTPException(503, "no slot available")
        return _json([self._slot(number, held.get(number)) for number in numbers])

    async def slot_action(self, request: Request) -> Response:
        """What llama-server does with a slot's file.

        Raises:
            HTTPException: 501; sessions are kept and exported otherwise.
        """
        raise HTTPException(
            501, "Sessions are kept by themselves; see /v1/cache/sessions to export or wipe one."
        )

    async def tokenize(self, request: Request) -> Response:
        """Text → token ids.

        Raises:
            InvalidRequest: no text, or one that is not valid Unicode.
        """
        asked = await self._read(request, Tokenize)
        tokens = await self._generations.on_prompt_thread(self._encode, asked)
        pieces = [TokenPiece(token, self._piece(token)) for token in tokens]
        return _json(Tokens(pieces if asked.with_pieces else tokens))

    async def detokenize(self, request: Request) -> Response:
        """Token ids → text.

        Raises:
            InvalidRequest: an id that no token has.
        """
        asked = await self._read(request, Detokenize)
        text = await self._generations.on_prompt_thread(
            self._service.tokenizer.decode, asked.tokens
        )
        return _json(Content(text))

    async def apply_template(self, request: Request) -> Response:
        """Messages → the prompt's text; the body is that of /v1/chat/completions.

        Raises:
            InvalidRequest: whatever is wrong with the messages.
        """
        body = await read_body(request, self._service.limits.max_body_bytes)
        conversation = await self._generations.on_prompt_thread(
            self._read_conversation, body, request.headers
        )
        tokens = await self._generations.prompt_tokens(conversation)
        return _json(Rendered(self._service.tokenizer.decode(tokens)))

    @property
    def _num_slots(self) -> int:
        return self._service.engine.info.max_sequences

    async def _read(self, request: Request, kind: type[S]) -> S:
        body = await read_body(request, self._service.limits.max_body_bytes)
        return decode_body(body, kind)

    def _encode(self, asked: Tokenize) -> list[int]:
        if asked.add_special:
            raise InvalidRequest("add_special: the model has no such tokens.", "add_special")
        return self._service.tokenizer.encode(asked.content, special=asked.parse_special)

    def _piece(self, token: int) -> str | list[int]:
        spelled = self._service.tokenizer.token_bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return list(spelled)

    def _params(self) -> dict[str, Any]:
        """llama-server's names of the sampling defaults."""
        sampling, defaults = self._service.sampling, self._service.defaults
        limit = -1 if defaults.max_tokens is None else defaults.max_tokens
        return {
            "seed": -1 if sampling.seed is None else sampling.seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "n_predict": limit,
            "max_tokens": limit,
            "n_keep": 0,
            "ignore_eos": False,
            "stream": True,
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "reasoning_format": "deepseek",
            "chat_format": "Qwen 3.5",
        }

    def _slot(self, number: int, generation: Generation | None) -> Slot:
        busy = generation is not None
        prompt, done, cached, sampled = generation.counts if generation else (0, 0, 0, 0)
        return Slot(
            id=number,
            id_task=number if busy else -1,
            n_ctx=self._service.engine.info.context_length,
            is_processing=busy,
            n_prompt_tokens=prompt,
            n_prompt_tokens_processed=done,
            n_prompt_tokens_cache=cached,
            params=self._params(),
            next_token=[{"has_next_token": busy, "n_decoded": sampled}],
        )


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
