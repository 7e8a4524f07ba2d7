"""The real engine, made to say what it is told: evaluation and checkpoints are real, choices not.

Owns the wrapping of requests with a constraint that leaves one token each time, and the counting of
what was evaluated for whom. Event loop, and the engine's thread for counts.
"""

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import msgspec
import numpy as np
from msgspec import Struct

from daemon.engine.constraint import Mask
from daemon.engine.requests import (
    Deliver,
    Engine,
    EngineInfo,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Started,
)
from daemon.errors import QwendError


class ForcedReply:
    """Allows exactly these tokens, one after the other. Fulfils `Constraint`."""

    failure: QwendError | None = None

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._tokens = list(reversed(tokens))
        self._num_words = -(-vocab_size // 32)

    def allowed(self) -> Mask:
        """One bit."""
        mask = np.zeros(self._num_words, np.uint32)
        token = self._tokens[-1]
        mask[token // 32] = 1 << token % 32
        return mask

    def advance(self, token: int) -> None:
        """The next one."""
        assert self._tokens.pop() == token


class Asked(Struct):
    """What one client's request is to be answered, by its prompt, and what became of it."""

    reply: Callable[[tuple[int, ...]], tuple[int, ...]]
    tokens: tuple[int, ...] = ()
    num_cached: int = 0


class ForcedEngine:
    """Fulfils the Engine Protocol around a real one.

    Attributes:
        num_ahead: tokens evaluated as idle work.
    """

    def __init__(self, engine: Engine, stop_token: int) -> None:
        self.num_ahead = 0
        self._engine = engine
        self._stop_token = stop_token
        self._asked: ContextVar[Asked] = ContextVar("asked")
        self._changed = threading.Condition()
        self._num_idle = 0

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        return self._engine.info

    def expect(self, asked: Asked) -> None:
        """What requests of the calling task are answered with."""
        self._asked.set(asked)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """See `Engine.submit`."""
        if request.priority != "client":
            with self._changed:
                self._num_idle += 1
            self._engine.submit(request, self._idle(deliver))
            return
        asked = self._asked.get()
        asked.tokens = request.tokens
        tokens = (*asked.reply(request.tokens), self._stop_token)
        forced = msgspec.structs.replace(
            request,
            constraint=ForcedReply(tokens, self._engine.info.vocab_size),
            max_tokens=len(tokens),
            stop_tokens=frozenset({self._stop_token}),
        )
        self._engine.submit(forced, _noting_cached(asked, deliver))

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._engine.cancel(request_id)

    def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until the work ahead is done."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._num_idle, timeout_s):
                raise TimeoutError("the work ahead takes too long")

    def _idle(self, deliver: Deliver) -> Callable[[Event], None]:
        done = 0

        def note(event: Event) -> None:
            nonlocal done
            match event:
                case Started():
                    done = event.num_cached_tokens
                case Finished() | Failed():
                    with self._changed:
                        self._num_idle -= 1
                        self._changed.notify_all()
                case _:
                    now = getattr(event, "num_done_tokens", done)
                    self.num_ahead += now - done
                    done = now
            deliver(event)

        return note


def _noting_cached(asked: Asked, deliver: Deliver) -> Deliver:
    def note(event: Event) -> None:
        if isinstance(event, Started):
            asked.num_cached = event.num_cached_tokens
        deliver(event)

    return note
