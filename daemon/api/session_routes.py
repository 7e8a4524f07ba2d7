"""Sessions as objects: /v1/cache/sessions: listed, renamed, pinned, forked, moved and wiped.

Owns these routes and what they take. What a session is, the store knows; here it is any Struct.
Event loop; the store's answers are waited for on a thread of their own.
"""

import logging
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from daemon.api.generations import Generations
from daemon.api.request_body import decode_body, read_body
from daemon.api.service import Service, StoredSessions
from daemon.errors import QwendError, UnknownSession

logger = logging.getLogger(__name__)

Name = Annotated[str, Meta(min_length=1, max_length=256)]


class Changes(Struct, forbid_unknown_fields=True):
    """The body of PATCH."""

    title: str | None = None
    pinned: bool | None = None


class Fork(Struct, forbid_unknown_fields=True):
    """The body of a fork: its own name, and where it leaves the other, in tokens."""

    session: Name
    position: Annotated[int, Meta(ge=0)] | None = None
    title: str = ""


class SessionList(Struct):
    """The body of /v1/cache/sessions."""

    data: object
    object: str = "list"


class Download(StreamingResponse):
    """A file whose making may fail when part of it is sent: the log has a line, and the connection
    is closed before the body's end, so that nobody takes the file for whole."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or as much as there is."""
        try:
            await super().__call__(scope, receive, send)
        except QwendError as error:
            logger.warning("%s", error)


class SessionRoutes:
    """The endpoints, with what they read."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    async def rows(self, _: Request) -> Response:
        """All sessions, the last used first."""
        return _json(SessionList(await run_in_threadpool(self._sessions.rows)))

    async def row(self, request: Request) -> Response:
        """One session with its checkpoints."""
        return _json(await run_in_threadpool(self._sessions.row, _name(request)))

    async def change(self, request: Request) -> Response:
        """Rename, pin or unpin a session."""
        changes = await self._body(request, Changes)
        return _json(await run_in_threadpool(self._change, _name(request), changes))

    async def fork(self, request: Request) -> Response:
        """Make a session that goes on from this one; a client goes on by its `session`."""
        fork = await self._body(request, Fork)
        return _json(await run_in_threadpool(self._fork, _name(request), fork), 201)

    async def wipe(self, request: Request) -> Response:
        """Delete a session: its checkpoints, its sampled replies, its stored responses, what is
        remembered of its prompts; answers with what it was."""
        row = await run_in_threadpool(self._sessions.row, _name(request))
        session: str = msgspec.to_builtins(row)["session"]
        timelines = self._service.history.timelines(session)
        self._generations.revoke(session)
        wiped = await run_in_threadpool(self._sessions.wipe, _name(request), timelines)
        self._generations.forget(session)
        return _json({"wiped": wiped})

    async def export(self, request: Request) -> Response:
        """A session as one file."""
        name = _name(request)
        pieces = await run_in_threadpool(self._sessions.export, name)
        row = await run_in_threadpool(self._sessions.row, name)
        file_name = f"{msgspec.to_builtins(row)['id']}.qwend-session"
        headers = {"content-disposition": f'attachment; filename="{file_name}"'}
        return Download(pieces, media_type="application/octet-stream", headers=headers)

    async def take_in(self, request: Request) -> Response:
        """Import the file that is the body; `?session=` gives it another name."""
        path = await _spooled(request, self._sessions.folder)
        try:
            session = request.query_params.get("session")
            return _json(await run_in_threadpool(self._sessions.take_in, path, session), 201)
        finally:
            with suppress(OSError):
                path.unlink()

    @property
    def _sessions(self) -> StoredSessions:
        if self._service.sessions is None:
            raise UnknownSession(
                "This server keeps no checkpoints: it was started with --no-cache."
            )
        return self._service.sessions

    def _change(self, name: str, changes: Changes) -> object:
        return self._sessions.change(name, title=changes.title, is_pinned=changes.pinned)

    def _fork(self, name: str, fork: Fork) -> object:
        return self._sessions.fork(name, fork.session, position=fork.position, title=fork.title)

    async def _body(self, request: Request, kind: Any) -> Any:
        body = await read_body(request, self._service.limits.max_body_bytes)
        return decode_body(body, kind)


async def _spooled(request: Request, folder: Path) -> Path:
    """The body as a file; it may be larger than memory."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="import-", delete=False) as file:
        path = Path(file.name)
        try:
            async for chunk in request.stream():
                await run_in_threadpool(file.write, chunk)
        except BaseException:
            path.unlink()
            raise
    return path


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
