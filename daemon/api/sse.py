"""Server-sent events: framing, and a response that stops its source when the client goes.

Owns the wire form. Knows no dialect; an event's data is bytes already. Event loop.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from daemon.api.disconnect import until_disconnect

DONE = b"data: [DONE]\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or a reverse proxy holds the stream back
]


def frame(data: bytes, event: bytes = b"") -> bytes:
    """One event, named if the dialect names them. `data` is JSON on a single line."""
    name = b"event: " + event + b"\n" if event else b""
    return name + b"data: " + data + b"\n\n"


class EventStream:
    """An ASGI response that sends frames as they come; empty ones are left out.

    Headers go out before the first frame is asked for. `close` is called in every case: end,
    error, disconnect, cancellation; also when no frame was ever sent.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        headers: dict[str, str] | None = None,
    ) -> None:
        self._frames = frames
        self._close = close
        extra = (headers or {}).items()
        self._headers = _HEADERS + [(k.encode("latin-1"), v.encode("latin-1")) for k, v in extra]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all frames, or as many as the client waits for."""
        try:
            await until_disconnect(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self._headers}
        await send(start)
        async with aclosing(self._frames) as frames:
            async for chunk in frames:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
