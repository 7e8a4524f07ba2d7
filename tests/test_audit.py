"""The self-audit finds a checkpoint that is wrong, and only that; answers are not its business."""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from engine.memory_store import MemoryStore
from engine.tape_harness import TapeHarness, small_limits
from engine.tape_model import continuation

from daemon.audit import AuditCounts, AuditedEngine
from daemon.checkpoint import Boundary
from daemon.engine.batch import Batch
from daemon.engine.requests import (
    Deliver,
    Event,
    Finished,
    GenerationRequest,
    Probed,
    SamplingParams,
    Started,
    TokenSampled,
)
from daemon.engine.scheduler import MAX_IDLE, Limits
from daemon.errors import DeviceError, EngineStopped


class Door:
    """The engine's front door, without a thread."""

    def __init__(self, harness: TapeHarness) -> None:
        self.harness = harness
        self.submitted: list[GenerationRequest] = []
        self.is_open = True

    @property
    def info(self) -> Any:
        return None

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        if not self.is_open:
            raise EngineStopped("closed")
        self.submitted.append(request)
        self.harness.engine.add(request, deliver)

    def cancel(self, request_id: str) -> None:
        self.harness.engine.cancel(request_id)


class Rig:
    def __init__(self, share: float = 1.0, limits: Limits | None = None) -> None:
        self.store = MemoryStore()
        allowed = msgspec.structs.replace(limits or small_limits(), max_residents=4)
        self.harness = TapeHarness(allowed, self.store)
        self.door = Door(self.harness)
        self.dropped: list[tuple[int, ...]] = []
        self.audit = AuditedEngine(
            self.door, share, lambda tokens: self.dropped.append(tuple(tokens)), lambda: 0.5
        )

    def submit(self, tokens: Sequence[int], logprobs: int | None = None) -> list[Event]:
        events: list[Event] = []
        request = GenerationRequest(
            id=f"r{len(self.door.submitted)}",
            tokens=tuple(tokens),
            boundaries=(Boundary(128, "user"), Boundary(len(tokens), "prompt")),
            max_tokens=4,
            sampling=SamplingParams(temperature=0.0, logprobs=logprobs),
        )
        self.audit.submit(request, events.append)
        return events

    def ask(self, tokens: Sequence[int]) -> list[Event]:
        events = self.submit(tokens)
        self.harness.run()
        return events

    def forget_residents(self) -> None:
        """What follows comes from the store."""
        while (resident := self.harness.scheduler.places.residents.take_oldest()) is not None:
            self.harness.scheduler.places.pages.give_back(resident.pages)
            self.harness.scheduler.places.slots.give_back(resident.slot)


def prompt(length: int = 200, first: int = 1) -> list[int]:
    chosen = random.Random(1)
    return [first, *(chosen.randrange(50_000) for _ in range(length - 1))]


def test_a_sound_checkpoint_is_compared_and_stays() -> None:
    rig = Rig()
    for _ in range(2):
        events = rig.ask(prompt())
        assert isinstance(events[-1], Finished)
        assert list(events[-1].tokens) == continuation(prompt(), 4)
        assert not any(isinstance(event, Probed) for event in events)
    assert rig.audit.counts() == AuditCounts(share=1.0, num_compared=1)
    assert rig.dropped == []
    cold = rig.door.submitted[2]
    assert (cold.priority, cold.max_tokens) == ("audit", 1)


def test_a_client_gets_the_alternatives_that_it_asked_for() -> None:
    rig = Rig()
    for logprobs, expected in ((None, None), (0, 0), (3, 3)):
        events = rig.submit(prompt(), logprobs)
        rig.harness.run()
        sampled = [event.logprobs for event in events if isinstance(event, TokenSampled)]
        assert len(sampled) == 4
        assert [s and len(s.alternatives) for s in sampled] == [expected] * 4


def test_what_was_evaluated_cold_is_not_evaluated_again_for_the_same_conversation() -> None:
    rig = Rig()
    tokens = prompt(400)
    for length in (200, 300, 400):
        rig.ask(tokens[:length])
    assert rig.audit.counts().num_compared == 2
    evaluated = sum(len(s.tokens) for b in rig.harness.model.batches for s in b.spans)
    for_clients = 200 + (300 - 192) + (400 - 256) + 3 * 3
    assert evaluated == for_clients + 300 + (400 - 256)


@pytest.mark.parametrize("max_sequences", [1, 3])
def test_an_interrupted_audit_goes_on_and_comes_to_its_end(max_sequences: int) -> None:
    rig = Rig(limits=small_limits(max_sequences, prefill_tokens=64, captures=4))
    tokens = prompt(900)
    rig.ask(tokens)
    rig.submit(tokens)
    while "r1-audit" not in rig.harness.engine.sequences:
        rig.harness.step()
    num_batches = len(rig.harness.model.batches)
    for number in range(6):
        rig.harness.step()
        rig.harness.step()
        events = rig.submit(prompt(80, first=100 + number))
        while not any(isinstance(event, Finished) for event in events):
            rig.harness.step()
    rig.harness.run()
    counts = rig.audit.counts()
    assert (counts.num_compared, counts.num_waiting, counts.num_abandoned) == (1, 0, 0)
    spans = [s for b in rig.harness.model.batches[num_batches:] for s in b.spans]
    assert sum(len(span.tokens) for span in spans) <= 900 + 6 * (80 + 3)


def test_too_many_audits_are_given_up_and_counted() -> None:
    rig = Rig()
    for number in range(MAX_IDLE + 3):
        rig.ask(prompt(100, first=number))
    for number in range(MAX_IDLE + 3):
        rig.submit(prompt(100, first=number))
    rig.harness.run()
    counts = rig.audit.counts()
    assert counts.num_waiting == 0
    assert counts.num_compared + counts.num_abandoned == MAX_IDLE + 3
    assert counts.num_abandoned >= 1


def put_in_place(store: MemoryStore, other: MemoryStore) -> None:
    """Give every record of `store` the content of another prompt's."""
    for records, others in ((store.states, other.states), (store.pages, other.pages)):
        contents = {len(key[0]): content for key, content in others.items()}
        for key in records:
            records[key] = contents[len(key[0])]


def test_a_wrong_checkpoint_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.ask(prompt())
    other = Rig()
    other.ask(prompt(first=2))
    put_in_place(rig.store, other.store)
    rig.forget_residents()
    rig.ask(prompt())
    assert rig.audit.counts() == AuditCounts(share=1.0, num_compared=1, num_mismatches=1)
    assert rig.dropped == [tuple(prompt())]
    assert "does not equal a cold evaluation" in caplog.text


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_more_than_its_share_is_audited(share: float) -> None:
    rig = Rig(share)
    for _ in range(2):
        rig.ask(prompt())
    assert len(rig.door.submitted) == 2
    assert rig.audit.counts() == AuditCounts(share=share)


def test_an_audit_leaves_nothing_in_the_store() -> None:
    rig = Rig()
    rig.ask(prompt())
    rig.store.interval = 64
    before = dict(rig.store.states)
    rig.harness.engine.add(
        GenerationRequest(id="audit", tokens=tuple(prompt()), max_tokens=1, priority="audit"),
        lambda _: None,
    )
    rig.harness.run()
    assert rig.store.states.keys() == before.keys()


def test_what_the_engine_does_not_take_is_given_up() -> None:
    rig = Rig()
    rig.ask(prompt())
    request = GenerationRequest(id="r", tokens=tuple(prompt()), max_tokens=2)
    rig.audit.submit(request, lambda event: setattr(rig.door, "is_open", False))
    rig.harness.run()
    assert rig.audit.counts().num_abandoned == 1


def test_a_checkpoint_that_went_meanwhile_is_compared_all_the_same() -> None:
    rig = Rig()
    rig.ask(prompt())
    request = GenerationRequest(id="r", tokens=tuple(prompt()), max_tokens=2)

    def forget(event: Event) -> None:
        if isinstance(event, Started):
            assert event.num_cached_tokens > 0
            rig.store.states.clear()

    rig.audit.submit(request, forget)
    rig.harness.run()
    assert rig.audit.counts().num_compared == 1


def test_an_audit_that_fails_is_given_up_and_costs_no_answer() -> None:
    rig = Rig()
    rig.ask(prompt())

    def fail_audits(batch: Batch) -> None:
        if all(span.start == 0 for span in batch.spans):
            raise DeviceError("no")

    rig.harness.model.before_batch = fail_audits
    events = rig.ask(prompt())
    assert isinstance(events[-1], Finished)
    counts = rig.audit.counts()
    assert (counts.num_abandoned, counts.num_waiting, counts.num_compared) == (1, 0, 0)
