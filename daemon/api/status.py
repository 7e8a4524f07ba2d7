"""What people and programs may ask about the server: health, reuse of prompts.

Owns the read-only routes. Event loop.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.generations import Generations
from daemon.api.service import EngineState, Service
from daemon.metrics import Load, MetricsSnapshot, SessionTally, Tally


class Health(Struct):
    """`status` is ok only when requests are taken. Those that wait are none of the running."""

    status: EngineState
    model: str
    backend: str
    running: int
    waiting: int
    uptime_s: float
    version: str


class TallyOut(Struct):
    """Sums over requests; reused plus evaluated are the prompts' tokens."""

    requests: int
    tokens_reused: int
    tokens_evaluated: int
    tokens_generated: int
    hit_rate: float


class SessionOut(Struct):
    """One session's sums, and what its last request found."""

    session: str
    requests: int
    tokens_reused: int
    tokens_evaluated: int
    tokens_generated: int
    hit_rate: float
    last_prompt_tokens: int
    last_cached_tokens: int
    idle_s: float


class CacheStats(Struct):
    """The body of /v1/cache/stats. Reused and lost are prompt tokens, `windows` by their span in
    seconds, `store` are the store's own figures."""

    uptime_s: float
    running: int
    waiting: int
    finished: dict[str, int]
    total: TallyOut
    reused_by_tier: dict[str, int]
    lost_by_cause: dict[str, int]
    windows: dict[str, TallyOut]
    sessions: list[SessionOut]
    store: Mapping[str, Any]


class Status:
    """The endpoints, with what they read."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    async def root(self, _: Request) -> Response:
        """Say who answers; clients probe it with GET or HEAD."""
        served = {"name": "qwend", "version": self._service.version}
        return _json(served | {"model": self._service.model_name, "api": "/v1"})

    async def health(self, _: Request) -> Response:
        """200 when requests are taken, 503 before and after."""
        state = self._service.engine_state()
        metrics, load = self._service.metrics.snapshot(), self._generations.load()
        info = self._service.engine.info
        body = Health(
            state,
            info.model_name,
            info.backend,
            load.num_running,
            load.num_waiting,
            round(metrics.uptime_s, 3),
            self._service.version,
        )
        return _json(body, 200 if state == "ok" else 503)

    async def cache_stats(self, _: Request) -> Response:
        """How much of the prompts was not evaluated again, and what the store holds."""
        metrics, load = self._service.metrics.snapshot(), self._generations.load()
        return _json(stats_out(metrics, load, self._service.cache_stats()))


def stats_out(metrics: MetricsSnapshot, load: Load, store: Mapping[str, Any]) -> CacheStats:
    """The statistics' body."""
    return CacheStats(
        uptime_s=round(metrics.uptime_s, 3),
        running=load.num_running,
        waiting=load.num_waiting,
        finished=metrics.finishes,
        total=_tally_out(metrics.total),
        reused_by_tier=metrics.reused,
        lost_by_cause=metrics.lost,
        windows={str(span): _tally_out(tally) for span, tally in metrics.windows.items()},
        sessions=[_session_out(row) for row in metrics.sessions],
        store=store,
    )


def _tally_out(tally: Tally) -> TallyOut:
    return TallyOut(
        tally.num_requests,
        tally.num_reused_tokens,
        tally.num_evaluated_tokens,
        tally.num_generated_tokens,
        round(tally.hit_rate, 4),
    )


def _session_out(row: SessionTally) -> SessionOut:
    tally = row.tally
    return SessionOut(
        row.session,
        tally.num_requests,
        tally.num_reused_tokens,
        tally.num_evaluated_tokens,
        tally.num_generated_tokens,
        round(tally.hit_rate, 4),
        row.last_prompt_tokens,
        row.last_cached_tokens,
        round(row.idle_s, 3),
    )


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
