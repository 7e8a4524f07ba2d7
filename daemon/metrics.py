"""Counts what the daemon did: requests, tokens reused, evaluated and generated, per session too.

Owns the counters. Knows no HTTP, no engine and no store; any thread may call it. Memory is
bounded: one bucket a second for a quarter of an hour, and the sessions used last.
"""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct

WINDOWS_S = (60, 300, 900)
"""Spans of the sliding rates, in seconds."""


class Load(Struct, frozen=True):
    """Requests at one moment: those that wait for their evaluation to begin (for their prompt to be
    built, for a place, for another request, for their checkpoint), and those that are answered."""

    num_waiting: int
    num_running: int


class RequestRecord(Struct, frozen=True, kw_only=True):
    """One request that has ended, in tokens and milliseconds; nothing of its text.

    `queue_ms`: from its arrival until its evaluation began; None: it never did.

    `tier` is where the cached tokens came from, `followed` whether another request in flight had
    evaluated them, which this one waited for; of the evaluated ones `num_lost_tokens` had been
    before, for the reason `cause`.

    Of a request that was cancelled or failed, fewer prompt tokens may have been evaluated than
    were not cached.
    """

    id: str
    model: str
    session: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_evaluated_tokens: int
    num_generated_tokens: int
    prompt_ms: float
    decode_ms: float
    finish: str
    queue_ms: float | None = None
    tier: str = ""
    followed: bool = False
    num_lost_tokens: int = 0
    cause: str = ""


class Tally(Struct, frozen=True):
    """Sums over some requests. Reused plus evaluated are the prompts' tokens."""

    num_requests: int = 0
    num_reused_tokens: int = 0
    num_evaluated_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Reused share of the prompts' tokens, 0 when there were none."""
        total = self.num_reused_tokens + self.num_evaluated_tokens
        return self.num_reused_tokens / total if total else 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.num_requests + other.num_requests,
            self.num_reused_tokens + other.num_reused_tokens,
            self.num_evaluated_tokens + other.num_evaluated_tokens,
            self.num_generated_tokens + other.num_generated_tokens,
        )


class SessionTally(Struct, frozen=True):
    """A session's sums; `idle_s` since its last request ended."""

    session: str
    tally: Tally
    last_prompt_tokens: int
    last_cached_tokens: int
    idle_s: float


class MetricsSnapshot(Struct, frozen=True, kw_only=True):
    """All counters at one moment; `windows` by their span in seconds, sessions newest first.
    `reused` are prompt tokens by tier, `lost` those evaluated again, by cause; `num_followed` the
    requests that waited for what another one in flight evaluated."""

    uptime_s: float
    num_followed: int
    finishes: dict[str, int]
    total: Tally
    reused: dict[str, int]
    lost: dict[str, int]
    windows: dict[int, Tally]
    sessions: tuple[SessionTally, ...]


@dataclass
class _Session:
    tally: Tally = field(default_factory=Tally)
    last: RequestRecord | None = None
    last_s: float = 0.0


class Metrics:
    """The counters of one daemon.

    Args:
        clock: monotonic seconds.
        max_sessions: rows kept; the session unused for longest goes first.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, max_sessions: int = 256
    ) -> None:
        self._clock = clock
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._started_s = clock()
        self._num_followed = 0
        self._total = Tally()
        self._finishes: dict[str, int] = {}
        self._reused: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._seconds: deque[tuple[int, Tally]] = deque()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._listeners: list[Callable[[RequestRecord], None]] = []

    def listen(self, listener: Callable[[RequestRecord], None]) -> None:
        """Tell of each request that ends; the listener must return at once."""
        self._listeners.append(listener)

    def request_ended(self, record: RequestRecord) -> None:
        """Count a request that has finished, failed or been cancelled."""
        tally = Tally(
            1,
            record.num_cached_tokens,
            record.num_evaluated_tokens,
            record.num_generated_tokens,
        )
        with self._lock:
            self._num_followed += record.followed
            self._total += tally
            self._finishes[record.finish] = self._finishes.get(record.finish, 0) + 1
            self._reused[record.tier] += record.num_cached_tokens
            self._lost[record.cause] += record.num_lost_tokens
            self._count_second(tally)
            self._count_session(record, tally)
        for listener in self._listeners:
            listener(record)

    def snapshot(self) -> MetricsSnapshot:
        """All counters, consistent with one another."""
        with self._lock:
            now = self._clock()
            return MetricsSnapshot(
                uptime_s=now - self._started_s,
                num_followed=self._num_followed,
                finishes=dict(self._finishes),
                total=self._total,
                reused={tier: count for tier, count in self._reused.items() if count},
                lost={cause: count for cause, count in self._lost.items() if count},
                windows={span: self._window(span, now) for span in WINDOWS_S},
                sessions=tuple(self._session_rows(now)),
            )

    def _count_second(self, tally: Tally) -> None:
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + tally)
        else:
            self._seconds.append((second, tally))
        while self._seconds[0][0] <= second - WINDOWS_S[-1]:
            self._seconds.popleft()

    def _count_session(self, record: RequestRecord, tally: Tally) -> None:
        session = self._sessions.setdefault(record.session, _Session())
        session.tally += tally
        session.last = record
        session.last_s = self._clock()
        self._sessions.move_to_end(record.session)
        if len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)

    def _window(self, span_s: int, now: float) -> Tally:
        oldest = int(now) - span_s
        return sum((tally for second, tally in self._seconds if second > oldest), Tally())

    def _session_rows(self, now: float) -> list[SessionTally]:
        return [
            SessionTally(
                name,
                session.tally,
                session.last.num_prompt_tokens,
                session.last.num_cached_tokens,
                now - session.last_s,
            )
            for name, session in reversed(self._sessions.items())
            if session.last is not None
        ]
