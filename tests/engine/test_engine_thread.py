"""The thread around the engine: every request is answered once, whatever fails."""

import threading
from collections.abc import Callable, Iterator

import pytest
from tape_harness import CONTEXT, build_engine, generation_request, small_limits
from tape_model import TapeModel, continuation

from daemon.engine.engine import StepEngine
from daemon.engine.engine_thread import EngineThread
from daemon.engine.requests import EngineInfo, Event, Failed, Finished, GenerationRequest
from daemon.errors import (
    DeviceError,
    DeviceLost,
    EngineStopped,
    ModelFileError,
    Overloaded,
    PromptTooLong,
)

INFO = EngineInfo(
    model_name="tape",
    context_length=CONTEXT,
    vocab_size=50_000,
    num_parameters=0,
    backend="tape",
    max_sequences=3,
)
PATIENCE_S = 20.0
ENDLESS = CONTEXT


class Answer:
    """Collects one request's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.first, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def wait(self) -> Event:
        assert self.ended.wait(PATIENCE_S), "the request was never answered"
        return self.events[-1]


class Stage:
    """An engine thread whose steps can be held and made to fail."""

    def __init__(self, max_requests: int = 8) -> None:
        self.may_step = threading.Event()
        self.may_step.set()
        self.error: Exception | None = None
        self.engine: StepEngine
        self.thread = EngineThread(self.build, INFO, max_requests)

    def build(self, wake: Callable[[], None]) -> StepEngine:
        self.engine = build_engine(small_limits())
        model: TapeModel = self.engine.model  # type: ignore[assignment]
        model.before_batch = lambda batch: self.hold()
        return self.engine

    def hold(self) -> None:
        assert self.may_step.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error

    def submit(self, number: int, length: int = 10, max_tokens: int = 4) -> Answer:
        answer = Answer()
        self.thread.submit(generation_request(number, range(1, length + 1), max_tokens), answer)
        return answer


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    stage.thread.start()
    yield stage
    stage.may_step.set()
    stage.thread.stop(PATIENCE_S)


def test_requests_of_many_threads_are_answered(stage: Stage) -> None:
    answers: dict[int, Answer] = {}

    def ask(number: int) -> None:
        answers[number] = stage.submit(number, length=10 + number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answer in answers.items():
        end = answer.wait()
        assert isinstance(end, Finished)
        assert list(end.tokens) == continuation(range(1, 11 + number), 4)
    assert stage.thread.info == INFO
    assert stage.thread.failure is None


def test_cancel_ends_a_request_within_a_step(stage: Stage) -> None:
    answer = stage.submit(0, max_tokens=ENDLESS)
    assert answer.first.wait(PATIENCE_S)
    stage.thread.cancel("r0")
    stage.thread.cancel("unknown")
    end = answer.wait()
    assert isinstance(end, Finished)
    assert end.reason in ("cancelled", "length")
    assert isinstance(stage.submit(1).wait(), Finished)


def test_a_cancel_that_overtakes_nothing(stage: Stage) -> None:
    """Commands are obeyed in order: a cancel just after the submit finds its request."""
    stage.may_step.clear()
    answer = stage.submit(0, max_tokens=ENDLESS)
    stage.thread.cancel("r0")
    stage.may_step.set()
    end = answer.wait()
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"


def test_too_many_requests_are_refused_and_room_comes_back() -> None:
    stage = Stage(max_requests=2)
    stage.thread.start()
    stage.may_step.clear()
    answers = [stage.submit(0), stage.submit(1)]
    with pytest.raises(Overloaded) as caught:
        stage.submit(2)
    assert caught.value.retry_after_s > 0
    stage.may_step.set()
    for answer in answers:
        answer.wait()
    assert isinstance(stage.submit(3).wait(), Finished)
    stage.thread.stop(PATIENCE_S)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_a_prompt_without_room_for_a_token_is_refused(stage: Stage, length: int) -> None:
    with pytest.raises(PromptTooLong, match=str(CONTEXT)):
        stage.submit(0, length=length)
    end = stage.submit(1, length=CONTEXT - 1).wait()
    assert isinstance(end, Finished)
    assert len(end.tokens) == 1


def test_stop_ends_what_runs_and_what_waits(stage: Stage) -> None:
    stage.may_step.clear()
    answers = [stage.submit(number, max_tokens=ENDLESS) for number in range(6)]
    stopper = threading.Thread(target=stage.thread.stop, args=(PATIENCE_S,))
    stopper.start()
    stage.may_step.set()
    stopper.join()
    for answer in answers:
        end = answer.wait()
        assert isinstance(end, Finished | Failed)
        assert isinstance(end, Failed) or end.reason in ("cancelled", "length")
    with pytest.raises(EngineStopped, match="shutting down"):
        stage.submit(9)


def test_a_request_queued_behind_the_stop_is_answered(stage: Stage) -> None:
    """Nothing that `submit` accepted is lost, even when it lies behind the end."""
    stage.may_step.clear()
    running = stage.submit(0, max_tokens=ENDLESS)
    assert running.first.wait(PATIENCE_S)
    stopper = threading.Thread(target=stage.thread.stop, args=(PATIENCE_S,))
    stopper.start()
    while stage.thread._commands.qsize() == 0:
        threading.Event().wait(0.001)
    late = stage.submit(1)
    stage.may_step.set()
    stopper.join()
    end = late.wait()
    assert isinstance(end, Failed)
    assert isinstance(end.error, EngineStopped)


def test_a_bug_in_a_step_answers_everyone_and_refuses_the_rest(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.may_step.clear()
    answers = [stage.submit(number) for number in range(5)]
    stage.error = ZeroDivisionError("a bug")
    stage.may_step.set()
    for answer in answers:
        end = answer.wait()
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineStopped)
    with pytest.raises(EngineStopped, match="see the log"):
        stage.submit(9)
    assert isinstance(stage.thread.failure, EngineStopped)
    assert "a bug" in caplog.text


def test_a_device_error_in_a_batch_does_not_stop_the_engine(stage: Stage) -> None:
    stage.error = DeviceError("a bad step")
    end = stage.submit(0).wait()
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeviceError)
    stage.error = None
    assert isinstance(stage.submit(1).wait(), Finished)


def test_a_lost_device_answers_everyone_and_ends_the_engine(stage: Stage) -> None:
    told = threading.Event()
    stage.thread.when_failed(told.set)
    stage.may_step.clear()
    answers = [stage.submit(number) for number in range(5)]
    stage.error = DeviceLost("Could not finish work on the GPU: an illegal access.")
    stage.may_step.set()
    for answer in answers:
        end = answer.wait()
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineStopped)
        assert "illegal access" in str(end.error)
    assert told.wait(PATIENCE_S)
    late = threading.Event()
    stage.thread.when_failed(late.set)
    assert late.is_set()
    with pytest.raises(EngineStopped, match="illegal access"):
        stage.submit(9)


def test_a_store_that_fails_at_the_door_answers_its_request(stage: Stage) -> None:
    def fail(tokens: object, session: str) -> None:
        raise RuntimeError("the store is broken")

    assert isinstance(stage.submit(0).wait(), Finished)
    stage.engine.store.timeline = fail  # type: ignore[assignment, method-assign]
    end = stage.submit(1).wait()
    assert isinstance(end, Failed)
    assert isinstance(end.error, EngineStopped)


def test_start_raises_what_building_raised() -> None:
    def build(wake: Callable[[], None]) -> StepEngine:
        raise ModelFileError("no such file")

    thread = EngineThread(build, INFO, 4)
    with pytest.raises(ModelFileError, match="no such file"):
        thread.start()
    thread.stop(PATIENCE_S)


def test_the_engine_is_built_on_its_own_thread(stage: Stage) -> None:
    names = []
    stage.engine.model.before_batch = lambda batch: names.append(  # type: ignore[attr-defined]
        threading.current_thread().name
    )
    stage.submit(0).wait()
    assert set(names) == {"engine"}


def test_an_empty_prompt_is_our_own_mistake(stage: Stage) -> None:
    with pytest.raises(AssertionError):
        stage.thread.submit(GenerationRequest(id="r", tokens=(), max_tokens=1), Answer())
