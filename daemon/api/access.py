"""Who may ask: the server's names, browsers' pages, keys, and how much one key may ask for.

Owns the checks before any route. A page in a browser on this machine reaches loopback too, by a
name that it had resolved to it; so the Host must be a known one, and an Origin an allowed one.
ASGI middleware; event loop.
"""

import hmac
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from hashlib import sha256
from urllib.parse import urlsplit

from msgspec import Struct
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.api.allowance import Allowances
from daemon.api.errors import qwend_error_response
from daemon.errors import KeyRefused, PlaceRefused, QwendError

OPEN_PATHS = frozenset({"/", "/health", "/v1/health"})
"""Probes need no key."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class AccessRules(Struct, frozen=True, kw_only=True):
    """Without keys anybody may ask. `hosts` are names of this server, None: any will do.

    `origins` are pages that may ask from a browser, "*": any. Limits are those of one key, or of
    all who ask where there are no keys; None: no limit.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    parallel_requests: int | None = None


class Access:
    """Lets a request through, or answers it with an error."""

    def __init__(
        self, app: ASGIApp, rules: AccessRules, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._rules = rules
        self._digests = [_digest(key.encode("utf-8", "surrogateescape")) for key in rules.keys]
        self._allowances = Allowances(rules.requests_per_minute, rules.parallel_requests, now)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, count, and pass on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        with ExitStack() as allowance:
            try:
                self._check_place(request.headers)
                key = self._check_key(request)
                if request.method == "POST":
                    allowance.enter_context(self._allowances.taken_by(key))
            except QwendError as error:
                return await qwend_error_response(request, error)(scope, receive, send)
            await self._app(scope, receive, send)

    def _check_place(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _name_of(host)
        known = self._rules.hosts
        if known is not None and name not in known and not name.endswith(".localhost"):
            raise PlaceRefused(
                f"This server does not answer to the name {name[:80]!r}; --allowed-host adds one."
            )
        origin = headers.get("origin")
        if origin is None or origin in self._rules.origins or "*" in self._rules.origins:
            return
        if urlsplit(origin).netloc.casefold() != host.casefold():
            raise PlaceRefused(f"Pages of {origin[:80]!r} may not ask; --cors-origin allows it.")

    def _check_key(self, request: Request) -> int:
        """The number of the key that the request came with; 0 where none is needed."""
        if not self._digests or request.url.path in OPEN_PATHS:
            return 0
        given = _given_key(request.headers)
        if not given:
            raise KeyRefused("An API key is needed: Authorization: Bearer, or x-api-key.")
        digest = _digest(given.encode("latin-1"))  # as which headers are decoded
        # All keys are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise KeyRefused("The API key is not one of this server's.")
        return matches.index(True)


def local_hosts(host: str, more: Sequence[str]) -> frozenset[str]:
    """The names of a server that listens on loopback, as `host`."""
    return LOCAL_NAMES | {_name_of(name) for name in (host, *more)}


def _name_of(host: str) -> str:
    """Without port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].casefold()
    return (host.partition(":")[0] if host.count(":") == 1 else host).casefold().rstrip(".")


def _given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.casefold() == "bearer" else headers.get("x-api-key", "")


def _digest(key: bytes) -> bytes:
    """Of one length, whatever the key's is."""
    return sha256(key).digest()
