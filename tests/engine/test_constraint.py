"""A reply that is held to a form: every token through its constraint, once, in order."""

import random

import numpy as np
from tape_harness import TapeHarness, small_limits
from tape_model import continuation

from daemon.engine.constraint import Mask
from daemon.engine.requests import Failed, Finished
from daemon.errors import InvalidRequest, QwendError


class Every:
    """Allows anything but at every `n`-th token, which is forced; fails after `limit` tokens."""

    def __init__(self, n: int, forced: int, limit: int = 10**9) -> None:
        self.n = n
        self.forced = forced
        self.limit = limit
        self.tokens: list[int] = []

    @property
    def failure(self) -> QwendError | None:
        return InvalidRequest("no more") if len(self.tokens) >= self.limit else None

    def allowed(self) -> Mask | None:
        if len(self.tokens) % self.n:
            return None
        mask = np.zeros(-(-50_000 // 32), np.uint32)
        mask[self.forced // 32] = 1 << self.forced % 32
        return mask

    def advance(self, token: int) -> None:
        self.tokens.append(token)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def expected(tokens: list[int], count: int, n: int, forced: int) -> list[int]:
    reply: list[int] = []
    for index in range(count):
        reply += [forced] if index % n == 0 else continuation([*tokens, *reply], 1)
    return reply


def test_a_forced_token_is_sampled_and_evaluated() -> None:
    harness = TapeHarness()
    constraint = Every(3, 777)
    events = harness.submit(prompt(70), max_tokens=70, constraint=constraint)
    free = harness.submit(prompt(50, 1), max_tokens=20)
    harness.run()
    reply = expected(prompt(70), 70, 3, 777)
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, list(events[-1].tokens)) == ("length", reply)
    assert constraint.tokens == reply
    assert isinstance(free[-1], Finished)
    assert list(free[-1].tokens) == continuation(prompt(50, 1), 20)


def test_a_preempted_reply_goes_on_where_its_constraint_is() -> None:
    harness = TapeHarness(small_limits(max_sequences=3, num_pages=9))
    constraints = [Every(2, 100 + i) for i in range(3)]
    replies = [
        harness.submit(prompt(90, i), max_tokens=120, constraint=constraint)
        for i, constraint in enumerate(constraints)
    ]
    harness.run()
    for i, events in enumerate(replies):
        assert isinstance(events[-1], Finished)
        assert list(events[-1].tokens) == expected(prompt(90, i), 120, 2, 100 + i)
        assert constraints[i].tokens == list(events[-1].tokens)
    harness.assert_all_places_are_free()


def test_a_constraint_that_fails_ends_its_own_reply_only() -> None:
    harness = TapeHarness()
    failing = harness.submit(prompt(70), max_tokens=20, constraint=Every(3, 777, limit=5))
    other = harness.submit(prompt(50, 1), max_tokens=20)
    harness.run()
    assert isinstance(failing[-1], Failed)
    assert str(failing[-1].error) == "no more"
    assert isinstance(other[-1], Finished)
    harness.assert_all_places_are_free()


def test_a_stop_token_that_is_forced_is_a_stop() -> None:
    harness = TapeHarness()
    events = harness.submit(prompt(9), max_tokens=9, constraint=Every(1, 5), stop_tokens=[5])
    harness.run()
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].tokens) == ("stop", ())
