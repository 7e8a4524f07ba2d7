"""Endpoints that clients of these APIs look for and that a text model cannot have.

Owns their paths and why; each answers with an error that says so. Event loop.
"""

from collections.abc import Awaitable, Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.errors import InvalidRequest

REFUSED = {
    "/v1/embeddings": "this model writes text; serve an embedding model beside it",
    "/v1/rerank": "this model writes text; serve a ranking model beside it",
    "/v1/moderations": "nothing is moderated here",
    "/v1/audio/{kind:path}": "this model reads and writes text only",
    "/v1/images/{kind:path}": "this model reads and writes text only",
    "/v1/files": "no files are kept here; send the text itself",
    "/v1/batches": "there are no batches; send requests side by side",
    "/v1/messages/batches": "there are no batches; send requests side by side",
}


def refused_routes() -> Iterator[Route]:
    """A route for each."""
    for path, why in REFUSED.items():
        yield Route(path, _refusal(why), methods=["GET", "POST"])


def _refusal(why: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        raise InvalidRequest(f"{request.url.path} is not supported: {why}.")

    return refuse
