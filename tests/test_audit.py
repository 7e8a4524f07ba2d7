"""The self-audit finds a checkpoint that is wrong, and only that; answers are not its business."""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from engine.memory_store import MemoryStore
from engine.tape_harness import TapeHarness
from engine.tape_model import continuation

from daemon.audit import AuditCounts, AuditedEngine
from daemon.checkpoint import Boundary, Found
from daemon.engine.requests import (
    Deliver,
    Event,
    Finished,
    GenerationRequest,
    Started,
    TokenLogprobs,
    TokenSampled,
)
from daemon.errors import EngineStopped


class Door:
    """The engine's front door, without a thread; log-probabilities are made up from the token."""

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
        self.harness.engine.add(request, lambda event: deliver(_with_logprobs(event)))

    def cancel(self, request_id: str) -> None:
        self.harness.engine.cancel(request_id)


def _with_logprobs(event: Event) -> Event:
    if not isinstance(event, TokenSampled):
        return event
    alternatives = tuple((event.token + i, -0.5 - i) for i in range(20))
    return TokenSampled(event.token, TokenLogprobs(-0.5, alternatives))


class Rig:
    def __init__(self, share: float = 1.0) -> None:
        self.store = MemoryStore()
        self.harness = TapeHarness(store=self.store)
        self.door = Door(self.harness)
        self.dropped: list[tuple[int, ...]] = []
        self.audit = AuditedEngine(
            self.door, share, lambda tokens: self.dropped.append(tuple(tokens)), lambda: 0.5
        )

    def ask(self, tokens: Sequence[int]) -> list[Event]:
        events: list[Event] = []
        request = GenerationRequest(
            id=f"r{len(self.door.submitted)}",
            tokens=tuple(tokens),
            boundaries=(Boundary(128, "user"),),
            max_tokens=4,
        )
        self.audit.submit(request, events.append)
        self.harness.run()
        return events


def prompt(length: int = 200, first: int = 1) -> list[int]:
    chosen = random.Random(1)
    return [first, *(chosen.randrange(50_000) for _ in range(length - 1))]


def test_a_sound_checkpoint_is_compared_and_stays() -> None:
    rig = Rig()
    for _ in range(2):
        events = rig.ask(prompt())
        assert isinstance(events[-1], Finished)
        assert list(events[-1].tokens) == continuation(prompt(), 4)
    assert rig.audit.counts() == AuditCounts(share=1.0, num_compared=1)
    assert rig.dropped == []
    resumed, cold = rig.door.submitted[2:]
    assert [(r.priority, r.max_cached, r.max_tokens) for r in (resumed, cold)] == [
        ("idle", 128, 1),
        ("idle", 0, 1),
    ]
    rig.harness.assert_all_places_are_free()


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


def test_an_audit_leaves_nothing_behind() -> None:
    rig = Rig()
    rig.ask(prompt())
    before = dict(rig.store.states)
    rig.store.interval = 64
    rig.ask(prompt(190))
    assert {len(tokens) for tokens, _ in rig.store.states} >= {128}
    extra = rig.store.states.keys() - before.keys()
    rig.harness.engine.add(
        GenerationRequest(
            id="audit", tokens=tuple(prompt(180)), max_tokens=1, priority="idle", max_cached=0
        ),
        lambda _: None,
    )
    rig.harness.run()
    assert rig.store.states.keys() == before.keys() | extra


def test_what_the_engine_does_not_take_is_given_up() -> None:
    rig = Rig()
    rig.ask(prompt())
    request = GenerationRequest(id="r", tokens=tuple(prompt()), max_tokens=2)
    rig.audit.submit(request, lambda event: setattr(rig.door, "is_open", False))
    rig.harness.run()
    assert rig.audit.counts().num_abandoned == 1


def test_a_checkpoint_that_went_meanwhile_is_no_mismatch() -> None:
    rig = Rig()
    rig.ask(prompt())
    request = GenerationRequest(id="r", tokens=tuple(prompt()), max_tokens=2)

    def forget(event: Event) -> None:
        if isinstance(event, Started):
            assert event.restored == Found(128, "prompt", "user")
            rig.store.states.clear()

    rig.audit.submit(request, forget)
    rig.harness.run()
    counts = rig.audit.counts()
    assert (counts.num_compared, counts.num_abandoned) == (0, 1)
    assert msgspec.to_builtins(counts)["share"] == 1.0
