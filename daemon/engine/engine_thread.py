"""The only thread that touches the device: takes commands, steps the engine, delivers events.

Owns the command queue and the thread. Fulfils the `Engine` Protocol for any other thread.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from msgspec import Struct

from daemon.checkpoint import Birth
from daemon.engine.engine import StepEngine
from daemon.engine.memory.inner_states import InnerStates
from daemon.engine.requests import (
    Deliver,
    EngineInfo,
    Event,
    Failed,
    Finished,
    GenerationRequest,
)
from daemon.errors import EngineStopped, Overloaded, PromptTooLong, QwendError

logger = logging.getLogger(__name__)


class Submit(Struct, frozen=True):
    """Queue a request."""

    request: GenerationRequest
    deliver: Deliver


class Cancel(Struct, frozen=True):
    """End a request."""

    request_id: str


class Wake(Struct, frozen=True):
    """Something that the engine waits for has happened."""


class Stop(Struct, frozen=True):
    """End all requests and the thread."""


Command = Submit | Cancel | Wake | Stop


class EngineThread:
    """Runs a StepEngine, which `build` makes on the thread that will own it.

    Args:
        build: gets the `wake` callback for the engine; runs on the engine's thread.
        info: what is served.
        max_requests: running and waiting together; more are refused as Overloaded.
    """

    def __init__(
        self,
        build: Callable[[Callable[[], None]], StepEngine],
        info: EngineInfo,
        max_requests: int,
    ) -> None:
        self._build = build
        self._info = info
        self._max_requests = max_requests
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_open = 0
        self._failure: QwendError | None = None
        self._on_failure: Callable[[], None] | None = None
        self._built: Future[None] = Future()
        self._inner = InnerStates()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        """What is served; constant."""
        return self._info

    @property
    def failure(self) -> QwendError | None:
        """Why no request is taken any more, or None while all is well."""
        return self._failure

    def when_failed(self, call: Callable[[], None]) -> None:
        """Have `call` run, on any thread, once no request is taken any more."""
        with self._lock:
            self._on_failure = call
            has_failed = self._failure is not None
        if has_failed:
            call()

    def born_on_device(self, name: bytes) -> Birth | None:
        """How the state inside a message was born that lies on the device after tokens of this name
        (see `Timeline.name`); None where there is none. Any thread."""
        return self._inner.born(name)

    def start(self) -> None:
        """Start the thread and wait until the engine is built.

        Raises:
            QwendError: whatever building it raised.
        """
        self._thread.start()
        self._built.result()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End all requests (their work is kept) and the thread; waits for it."""
        self._commands.put(Stop())
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """See `Engine.submit`."""
        if len(request.tokens) >= self._info.context_length:
            raise PromptTooLong(len(request.tokens), self._info.context_length)
        assert request.tokens, "an empty prompt has nothing to continue"
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if request.priority != "client":
                self._commands.put(Submit(request, deliver))
                return
            if self._num_open >= self._max_requests:
                raise Overloaded(f"{self._num_open} requests are running or waiting already")
            self._num_open += 1
            # Under the lock: after `_refuse_all` has taken it, nothing may be queued any more.
            self._commands.put(Submit(request, self._counted(deliver)))

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._commands.put(Cancel(request_id))

    def _counted(self, deliver: Deliver) -> Deliver:
        def count_and_deliver(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                with self._lock:
                    self._num_open -= 1
            deliver(event)

        return count_and_deliver

    # ── on the engine's thread ────────────────────────────────────────────────────────────────

    def _main(self) -> None:
        try:
            engine = self._build(lambda: self._commands.put(Wake()))
        except BaseException as error:
            self._built.set_exception(error)
            return
        self._inner = engine.scheduler.places.inner
        self._built.set_result(None)
        self._refuse_all(engine, self._serve(engine))

    def _serve(self, engine: StepEngine) -> EngineStopped:
        """Run until told to stop or until a step fails; what to tell those who still ask."""
        try:
            self._loop(engine)
        except QwendError as error:
            logger.error("the engine stopped: %s", error)
            return EngineStopped(f"the engine stopped: {error}")
        except Exception:
            logger.exception("the engine failed")
            return EngineStopped("the engine failed; see the log")
        return EngineStopped("qwend is shutting down")

    def _loop(self, engine: StepEngine) -> None:
        worked = False
        while True:
            command = self._next_command(wait=not worked)
            while command is not None:
                if isinstance(command, Stop):
                    engine.stop()
                    return
                self._obey(engine, command)
                command = self._next_command(wait=False)
            worked = engine.step()

    def _obey(self, engine: StepEngine, command: Submit | Cancel | Wake) -> None:
        match command:
            case Submit(request, deliver):
                try:
                    engine.add(request, deliver)
                except Exception:
                    deliver(Failed(EngineStopped("the engine failed; see the log")))
                    raise
            case Cancel(request_id):
                engine.cancel(request_id)

    def _next_command(self, wait: bool) -> Command | None:
        """One at a time: what is not taken yet is answered by `_refuse_all` after a failure."""
        try:
            return self._commands.get(block=wait)
        except Empty:
            return None

    def _refuse_all(self, engine: StepEngine, failure: QwendError) -> None:
        """Answer what is open and what is still queued; nothing comes in after this."""
        with self._lock:
            self._failure = failure
            on_failure = self._on_failure
        engine.fail(tuple(engine.sequences.values()), failure)
        engine.outbox.empty()
        while (command := self._next_command(wait=False)) is not None:
            if isinstance(command, Submit):
                command.deliver(Failed(failure))
        if on_failure is not None:
            on_failure()
