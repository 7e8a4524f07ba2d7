"""The ASGI application: every route, every error's answer, start and end.

Owns the wiring of HTTP; what a route does is in its own file. Event loop.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from daemon.api.access import Access, AccessRules
from daemon.api.anthropic_messages import Messages
from daemon.api.cache_routes import CacheRoutes
from daemon.api.errors import http_error_response, qwend_error_response, unexpected_error_response
from daemon.api.generations import Generations
from daemon.api.llama_server import LlamaServer
from daemon.api.models import Models
from daemon.api.openai_chat import ChatCompletions
from daemon.api.openai_completions import Completions
from daemon.api.openai_responses import Responses
from daemon.api.openapi import openapi
from daemon.api.prometheus import Prometheus
from daemon.api.refused_routes import refused_routes
from daemon.api.service import Service
from daemon.api.session_routes import SessionRoutes
from daemon.api.status import Status
from daemon.errors import QwendError


def create_app(service: Service) -> Starlette:
    """The application for one served model.

    `app.state.generations.close()` ends all running replies, as a server does when it stops.
    """
    generations = Generations(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        generations.close()

    app = Starlette(
        middleware=_gates(service.access),
        routes=[
            *_answers(service, generations),
            *_facts(service, generations),
            *refused_routes(),
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


def _gates(rules: AccessRules) -> list[Middleware]:
    """What stands before all routes; a browser asks by OPTIONS first, without a key."""
    gates = [Middleware(Access, rules=rules)]
    if rules.origins:
        shown = ("x-request-id", "request-id", "x-cache-plan", "x-qwend-ignored", "retry-after")
        cors = Middleware(
            CORSMiddleware,
            allow_origins=rules.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=shown,
        )
        gates.insert(0, cors)
    return gates


def _answers(service: Service, generations: Generations) -> Iterator[Route]:
    """The dialects, and what needs their reading of a body."""
    chat = ChatCompletions(service, generations)
    completions = Completions(service, generations)
    responses = Responses(service, generations)
    messages = Messages(service, generations)
    cache = CacheRoutes(
        service,
        generations,
        {
            "chat": chat.conversation,
            "completions": completions.conversation,
            "responses": responses.conversation,
            "messages": messages.conversation,
        },
    )
    for version in ("/v1", ""):  # llama-server answers without it too
        yield Route(f"{version}/chat/completions", chat.answer, methods=["POST"])
        yield Route(f"{version}/completions", completions.answer, methods=["POST"])
    yield Route("/v1/responses", responses.answer, methods=["POST"])
    yield Route("/v1/responses/input_tokens", responses.count_tokens, methods=["POST"])
    yield Route("/v1/responses/{id}", responses.fetch)
    yield Route("/v1/responses/{id}", responses.delete, methods=["DELETE"])
    yield Route("/v1/messages", messages.answer, methods=["POST"])
    yield Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"])
    yield Route("/v1/cache/requests", cache.requests)
    yield Route("/v1/cache/requests/{id}", cache.request)
    yield Route("/v1/cache/plan", cache.plan, methods=["POST"])
    yield from _of_llama_server(LlamaServer(service, generations, chat.conversation))


def _of_llama_server(routes: LlamaServer) -> Iterator[Route]:
    """What its users' tools ask for."""
    yield Route("/props", routes.props)
    yield Route("/slots", routes.slots)
    yield Route("/slots/{id}", routes.slot_action, methods=["POST"])
    yield Route("/tokenize", routes.tokenize, methods=["POST"])
    yield Route("/detokenize", routes.detokenize, methods=["POST"])
    yield Route("/apply-template", routes.apply_template, methods=["POST"])


def _facts(service: Service, generations: Generations) -> Iterator[Route]:
    """What may be asked about the server, its model and its sessions."""
    status = Status(service, generations)
    models = Models(service)
    sessions = SessionRoutes(service, generations)
    prometheus = Prometheus(service, generations)
    yield Route("/metrics", prometheus.metrics)
    yield Route("/", status.root)
    yield Route("/api/hello", status.root)
    yield Route("/openapi.json", openapi)
    yield Route("/health", status.health)
    yield Route("/v1/health", status.health)
    yield Route("/v1/models", models.models)
    yield Route("/models", models.models)
    yield Route("/v1/models/{model:path}", models.model)
    yield Route("/v1/cache/stats", status.cache_stats)
    yield Route("/v1/cache/sessions", sessions.rows)
    yield Route("/v1/cache/sessions/import", sessions.take_in, methods=["POST"])
    yield Route("/v1/cache/sessions/{name:path}/export", sessions.export)
    yield Route("/v1/cache/sessions/{name:path}/fork", sessions.fork, methods=["POST"])
    yield Route("/v1/cache/sessions/{name:path}", sessions.row, methods=["GET"])
    yield Route("/v1/cache/sessions/{name:path}", sessions.change, methods=["PATCH"])
    yield Route("/v1/cache/sessions/{name:path}", sessions.wipe, methods=["DELETE"])
