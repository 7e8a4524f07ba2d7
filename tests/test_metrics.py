"""The daemon's counters: sums, sliding windows, bounded sessions, threads."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from daemon.metrics import WINDOWS_S, Metrics, RequestRecord, Tally


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(session: str = "s", cached: int = 30, prompt: int = 100) -> RequestRecord:
    return RequestRecord(
        id="r",
        model="m",
        session=session,
        num_prompt_tokens=prompt,
        num_cached_tokens=cached,
        num_evaluated_tokens=prompt - cached,
        num_generated_tokens=7,
        prompt_ms=1.0,
        decode_ms=2.0,
        finish="stop",
    )


def test_nothing_yet() -> None:
    snapshot = Metrics().snapshot()
    assert snapshot.total == Tally()
    assert snapshot.total.hit_rate == 0
    assert snapshot.sessions == ()


def test_one_has_ended() -> None:
    metrics = Metrics()
    metrics.request_ended(record())
    snapshot = metrics.snapshot()
    assert snapshot.finishes == {"stop": 1}
    assert snapshot.total == Tally(1, 30, 70, 7)
    assert snapshot.total.hit_rate == 0.3


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 100)), max_size=30))
def test_windows_hold_the_last_seconds(steps: list[tuple[int, int]]) -> None:
    clock = Clock()
    metrics = Metrics(clock)
    seen = []
    for wait_s, cached in steps:
        clock.now += wait_s
        metrics.request_ended(record(cached=cached))
        seen.append((clock.now, cached))
    for span, tally in metrics.snapshot().windows.items():
        recent = [cached for when, cached in seen if when > clock.now - span]
        assert tally.num_requests == len(recent)
        assert tally.num_reused_tokens == sum(recent)


def test_windows_forget() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    metrics.request_ended(record())
    clock.now += WINDOWS_S[0]
    windows = metrics.snapshot().windows
    assert windows[WINDOWS_S[0]] == Tally()
    assert windows[WINDOWS_S[1]].num_requests == 1


def test_sessions_are_bounded_and_newest_first() -> None:
    clock = Clock()
    metrics = Metrics(clock, max_sessions=2)
    for session in ("a", "b", "a", "c"):
        clock.now += 1
        metrics.request_ended(record(session))
    clock.now += 5
    rows = metrics.snapshot().sessions
    assert [(row.session, row.tally.num_requests, row.idle_s) for row in rows] == [
        ("c", 1, 5.0),
        ("a", 2, 6.0),
    ]


def test_threads_lose_nothing() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(200):
            metrics.request_ended(record())

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.snapshot().total.num_requests == 800
