"""Serves the application on an address until it is told to stop.

Owns the socket, the signals and the order of the end: take no more, end the running replies,
close the connections. Runs on the thread that calls it.
"""

import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from daemon.errors import ConfigError, PortInUse

CLOSE_TIMEOUT_S = 5
"""How long connections may take to close once their replies have ended."""


class Server(uvicorn.Server):
    """uvicorn, with our own order of the end. `stop` may be called from any thread.

    Args:
        on_ready: called with the URL once connections are taken.
    """

    def __init__(self, app: Starlette, on_ready: Callable[[str], None] = lambda url: None) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            server_header=False,
        )
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    def serve_on(self, listener: socket.socket) -> None:
        """Serve until SIGINT, SIGTERM or `stop`; a second SIGINT waits for nothing.

        Args:
            listener: from `bind`; clients that connect before this call wait.
        """
        self.run(sockets=[listener])

    def stop(self) -> None:
        """End soon; running replies are cancelled."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then say so."""
        await super().startup(sockets)
        assert sockets is not None
        self._on_ready(url_of(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the replies first, since uvicorn waits for their connections."""
        self._app.state.generations.close()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while serving; uvicorn's own would raise them again afterwards.

        The caller has a store and an engine to close, which a raised signal would prevent.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        PortInUse: another program listens there.
        ConfigError: the address is none of this machine's.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"Cannot listen on port {port}: it must be from 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"Cannot listen on {host}:{port}: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} on {host} is in use; stop the other program or pass another --port."
            ) from error
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
