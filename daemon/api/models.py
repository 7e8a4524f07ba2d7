"""GET /v1/models and /v1/models/{id}: what is served, in OpenAI's form and in Anthropic's.

Owns both forms; a client is told apart by Anthropic's version header. Event loop.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.errors import speaks_anthropic
from daemon.api.service import Service

CAPABILITIES = (
    "completion",
    "chat",
    "tools",
    "reasoning",
    "structured-output",
    "fill-in-the-middle",
)


class ModelMeta(Struct):
    """Facts of the model file; `n_ctx` and its like are llama-server's names."""

    n_ctx: int
    n_vocab: int
    n_params: int
    backend: str
    max_sequences: int


class Model(Struct, kw_only=True):
    """One entry of the list. The context length in tokens, under the names clients look for."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "qwend"
    context_length: int
    context_window: int
    max_model_len: int
    capabilities: tuple[str, ...]
    aliases: tuple[str, ...]
    meta: ModelMeta


class ModelList(Struct):
    """The list."""

    data: tuple[Model, ...]
    object: str = "list"


class AnthropicModel(Struct, kw_only=True):
    """One entry of Anthropic's list; `capabilities` are those that it names itself."""

    id: str
    type: str = "model"
    display_name: str
    created_at: str
    max_input_tokens: int
    max_tokens: int
    lifecycle: str = "active"
    capabilities: dict[str, Any]


class AnthropicModelList(Struct):
    """Anthropic's list, all on one page."""

    data: tuple[AnthropicModel, ...]
    first_id: str
    last_id: str
    has_more: bool = False


class Models:
    """The endpoints, with what they read."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        if not speaks_anthropic(request):
            return _json(ModelList((self._model(),)))
        model = self._anthropic_model()
        return _json(AnthropicModelList((model,), model.id, model.id))

    async def model(self, request: Request) -> Response:
        """The model, by its name or an alias.

        Raises:
            UnknownModel: another name.
        """
        self._service.check_model(request.path_params["model"])
        is_anthropic = speaks_anthropic(request)
        return _json(self._anthropic_model() if is_anthropic else self._model())

    def _model(self) -> Model:
        info = self._service.engine.info
        meta = ModelMeta(
            info.context_length,
            info.vocab_size,
            info.num_parameters,
            info.backend,
            info.max_sequences,
        )
        return Model(
            id=info.model_name,
            created=self._service.created,
            context_length=info.context_length,
            context_window=info.context_length,
            max_model_len=info.context_length,
            capabilities=CAPABILITIES,
            aliases=self._service.aliases,
            meta=meta,
        )

    def _anthropic_model(self) -> AnthropicModel:
        info = self._service.engine.info
        created = datetime.fromtimestamp(self._service.created, UTC)
        return AnthropicModel(
            id=info.model_name,
            display_name=info.model_name,
            created_at=created.isoformat().replace("+00:00", "Z"),
            max_input_tokens=info.context_length,
            max_tokens=info.context_length,
            capabilities=_anthropic_capabilities(),
        )


def _anthropic_capabilities() -> dict[str, Any]:
    yes, no = {"supported": True}, {"supported": False}
    efforts = dict.fromkeys(("low", "medium", "high", "xhigh", "max"), yes)
    edits = ("clear_thinking_20251015", "clear_tool_uses_20250919", "compact_20260112")
    return {
        **dict.fromkeys(("batch", "citations", "code_execution", "image_input", "pdf_input"), no),
        "context_management": {**no, **dict.fromkeys(edits, no)},
        "effort": {**yes, **efforts},
        "server_tools": {**no, "code_execution": no, "web_search": no},
        "structured_outputs": yes,
        "thinking": {**yes, "types": {"adaptive": yes, "enabled": yes}},
    }


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
