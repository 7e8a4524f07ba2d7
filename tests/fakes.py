"""Stand-ins that keep the promises of the real thing: an engine that says what it is told."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from daemon.engine.requests import (
    Deliver,
    EngineInfo,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Progress,
    Started,
    TokenLogprobs,
    TokenSampled,
)
from daemon.errors import EngineStopped, Overloaded, PromptTooLong, QwendError


@dataclass(frozen=True)
class Script:
    """What the engine does with one request.

    `prefill_steps` steps of prompt evaluation, then `tokens` one a step, then `error` if there is
    one. `endless` repeats the tokens until the limit. It all begins after `hold_s` seconds.
    An `obedient` one says what its constraint allows in place of what it forbids.
    """

    tokens: Sequence[int] = ()
    prefill_steps: int = 1
    num_cached: int = 0
    num_kept: int = 0
    step_s: float = 0.0
    hold_s: float = 0.0
    endless: bool = False
    obedient: bool = False
    error: QwendError | None = None


@dataclass
class _Running:
    request: GenerationRequest
    deliver: Deliver
    script: Script
    prefilled: int = 0
    began_s: float = field(default_factory=time.monotonic)
    sampled: list[int] = field(default_factory=list)
    cancelled: bool = False


class ScriptedEngine:
    """Fulfils the Engine Protocol on a thread of its own, one step of every request in turn.

    Attributes:
        requests: all that were submitted, in order.
        cancelled: ids of those that ended as cancelled.
    """

    def __init__(
        self,
        script: Callable[[GenerationRequest], Script],
        *,
        vocab_size: int = 8192,
        context_length: int = 32768,
        max_waiting: int = 64,
    ) -> None:
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.num_steps = 0
        self._script = script
        self._max_waiting = max_waiting
        self._info = EngineInfo(
            model_name="tiny-coder",
            context_length=context_length,
            vocab_size=vocab_size,
            num_parameters=15_000_000,
            backend="scripted",
            max_sequences=8,
        )
        self._running: dict[str, _Running] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        if len(request.tokens) >= self._info.context_length:
            raise PromptTooLong(len(request.tokens), self._info.context_length)
        script = self._script(request)
        with self._changed:
            if self._stopped:
                raise EngineStopped("The engine is stopped.")
            if len(self._running) >= self._max_waiting:
                raise Overloaded("Too many requests wait.", retry_after_s=7)
            self.requests.append(request)
            self._running[request.id] = _Running(request, deliver, script)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._running:
                self._running[request_id].cancelled = True

    def stop(self) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def wait_until_idle(self, timeout_s: float = 5.0) -> bool:
        """Whether all requests ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._running) or self._stopped)
                running = list(self._running.values())
                stopped = self._stopped
            self.num_steps += 1
            for sequence in running:
                self._step(sequence, stopped)
            if stopped:
                return
            time.sleep(max(sequence.script.step_s for sequence in running))

    def _step(self, sequence: _Running, stopped: bool) -> None:
        if stopped:
            self._end(sequence, Failed(EngineStopped("The engine is stopped.")))
        elif sequence.cancelled:
            self.cancelled.append(sequence.request.id)
            self._end(sequence, self._finished(sequence, "cancelled"))
        elif time.monotonic() < sequence.began_s + sequence.script.hold_s:
            time.sleep(0.001)
        elif sequence.prefilled < sequence.script.prefill_steps:
            self._prefill(sequence)
        else:
            self._sample(sequence)

    def _prefill(self, sequence: _Running) -> None:
        num_prompt = len(sequence.request.tokens)
        if sequence.prefilled == 0:
            sequence.deliver(Started(num_prompt, sequence.script.num_cached))
        sequence.prefilled += 1
        done = num_prompt * sequence.prefilled // sequence.script.prefill_steps
        sequence.deliver(Progress(max(done, sequence.script.num_cached), num_prompt))

    def _sample(self, sequence: _Running) -> None:
        script, sampled = sequence.script, sequence.sampled
        if len(sampled) >= sequence.request.max_tokens:
            self._end(sequence, self._finished(sequence, "length"))
        elif script.endless or len(sampled) < len(script.tokens):
            token = script.tokens[len(sampled) % len(script.tokens)]
            if script.obedient:
                token = _obeying(sequence.request, token)
            if token in sequence.request.stop_tokens:
                self._end(sequence, self._finished(sequence, "stop"))
                return
            if (refusal := _refusal(sequence.request, token)) is not None:
                self._end(sequence, Failed(refusal))
                return
            sampled.append(token)
            sequence.deliver(TokenSampled(token, _logprobs(sequence.request, token)))
        elif script.error is not None:
            self._end(sequence, Failed(script.error))
        else:
            self._end(sequence, self._finished(sequence, "stop"))

    def _finished(self, sequence: _Running, reason: FinishReason) -> Finished:
        num_prompt = len(sequence.request.tokens)
        sampled = tuple(sequence.sampled)
        script = sequence.script
        return Finished(reason, num_prompt, script.num_cached, sampled, 12.0, 34.0, script.num_kept)

    def _end(self, sequence: _Running, event: Event) -> None:
        with self._changed:
            del self._running[sequence.request.id]
            self._changed.notify_all()
        sequence.deliver(event)


def _obeying(request: GenerationRequest, token: int) -> int:
    """The token itself where it is allowed, else one that ends the reply, else the first."""
    mask = request.constraint.allowed() if request.constraint is not None else None
    if mask is None:
        return token
    allowed = [i for i in range(32 * len(mask)) if mask[i // 32] >> i % 32 & 1]
    wanted = (token, *request.stop_tokens)
    return next((choice for choice in wanted if choice in allowed), allowed[0])


def _refusal(request: GenerationRequest, token: int) -> QwendError | None:
    """An error if the script breaks the constraint that the request came with."""
    if request.constraint is None:
        return None
    mask = request.constraint.allowed()
    if mask is not None and not mask[token // 32] >> token % 32 & 1:
        return QwendError(f"the script's token {token} is not allowed here")
    request.constraint.advance(token)
    return None


def _logprobs(request: GenerationRequest, token: int) -> TokenLogprobs | None:
    count = request.sampling.logprobs
    if count is None:
        return None
    return TokenLogprobs(-0.25, tuple((token + i, -0.25 - i) for i in range(count)))


class RememberedReplies:
    """Sampled tokens by frame text, in memory: what the store does for real."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, ...]] = {}

    def recall(self, frame_text: str) -> tuple[int, ...] | None:
        return self.entries.get(frame_text)

    def remember(self, entries: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        self.entries.update(entries)
