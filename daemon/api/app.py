"""The ASGI application: every route, every error's answer, start and end.

Owns the wiring of HTTP; what a route does is in its own file. Event loop.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from daemon.api.anthropic_messages import Messages
from daemon.api.cache_routes import CacheRoutes
from daemon.api.errors import http_error_response, qwend_error_response, unexpected_error_response
from daemon.api.generation import Generations
from daemon.api.models import Models
from daemon.api.openai_chat import ChatCompletions
from daemon.api.openai_responses import Responses
from daemon.api.service import Service
from daemon.api.session_routes import SessionRoutes
from daemon.api.status import Status
from daemon.errors import QwendError


def create_app(service: Service) -> Starlette:
    """The application for one served model.

    `app.state.generations.close()` ends all running replies, as a server does when it stops.
    """
    generations = Generations(service)
    status = Status(service)
    models = Models(service)
    sessions = SessionRoutes(service, generations)
    chat = ChatCompletions(service, generations)
    messages = Messages(service, generations)
    responses = Responses(service, generations)
    cache = CacheRoutes(
        service,
        generations,
        {
            "chat": chat.conversation,
            "messages": messages.conversation,
            "responses": responses.conversation,
        },
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        generations.close()

    app = Starlette(
        routes=[
            Route("/", status.root),
            Route("/health", status.health),
            Route("/v1/models", models.models),
            Route("/v1/models/{model:path}", models.model),
            Route("/v1/cache/stats", status.cache_stats),
            Route("/v1/cache/sessions", sessions.rows),
            Route("/v1/cache/sessions/import", sessions.take_in, methods=["POST"]),
            Route("/v1/cache/sessions/{name:path}/export", sessions.export),
            Route("/v1/cache/sessions/{name:path}/fork", sessions.fork, methods=["POST"]),
            Route("/v1/cache/sessions/{name:path}", sessions.row, methods=["GET"]),
            Route("/v1/cache/sessions/{name:path}", sessions.change, methods=["PATCH"]),
            Route("/v1/cache/sessions/{name:path}", sessions.wipe, methods=["DELETE"]),
            Route("/v1/cache/requests", cache.requests),
            Route("/v1/cache/requests/{id}", cache.request),
            Route("/v1/cache/plan", cache.plan, methods=["POST"]),
            Route("/v1/chat/completions", chat.answer, methods=["POST"]),
            Route("/v1/responses", responses.answer, methods=["POST"]),
            Route("/v1/responses/input_tokens", responses.count_tokens, methods=["POST"]),
            Route("/v1/responses/{id}", responses.fetch),
            Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
            Route("/v1/messages", messages.answer, methods=["POST"]),
            Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        ],
        exception_handlers={
            QwendError: qwend_error_response,
            HTTPException: http_error_response,
            Exception: unexpected_error_response,
        },
        lifespan=lifespan,
    )
    app.state.generations = generations
    return app
