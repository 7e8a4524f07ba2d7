"""GET /metrics: what the daemon did and what its store holds, for Prometheus.

Owns the names of the series and the histograms; sums come from metrics and the store when they are
asked for. Observations come from any thread, the route runs on the event loop.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.service import Service
from daemon.metrics import RequestRecord

PROMPT_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
TOKEN_BUCKETS_S = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.3)

_COUNTED = ("num_written", "written_bytes", "num_dropped", "num_damaged", "num_evicted",
            "num_compared", "num_mismatches", "num_abandoned")  # fmt: skip
"""Figures of the store that only grow; the others are gauges."""


class Prometheus:
    """The endpoint, and the series that need every request."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Sums(service))
        self._prompt_s = Histogram(
            "qwend_prompt_seconds", "Evaluation of a prompt.",
            buckets=PROMPT_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._token_s = Histogram(
            "qwend_token_seconds", "Generation of a token, the mean of each request.",
            buckets=TOKEN_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        service.metrics.listen(self._observe)

    async def metrics(self, request: Request) -> Response:
        """All series, in the form that the client accepts."""
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"content-type": kind})

    def _observe(self, record: RequestRecord) -> None:
        if record.prompt_ms:
            self._prompt_s.observe(record.prompt_ms / 1e3)
        if record.num_generated_tokens > 1 and record.decode_ms:
            self._token_s.observe(record.decode_ms / 1e3 / (record.num_generated_tokens - 1))


class _Sums(Collector):
    """What others count already."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The series at this moment."""
        metrics, info = self._service.metrics.snapshot(), self._service.engine.info
        build = GaugeMetricFamily(
            "qwend_info", "1, with what is served.", labels=["version", "model", "backend"]
        )
        build.add_metric([self._service.version, info.model_name, info.backend], 1)
        yield build
        yield _labelled("qwend_requests", "Requests that have ended.", "finish", metrics.finishes)
        yield _labelled(
            "qwend_prompt_tokens_reused",
            "Tokens of prompts that were not evaluated again.",
            "tier",
            metrics.reused,
        )
        yield _labelled(
            "qwend_prompt_tokens_lost",
            "Tokens evaluated again though they had been before.",
            "cause",
            metrics.lost,
        )
        yield _gauge("qwend_requests_running", "Requests that are being answered.",
                     metrics.num_running)  # fmt: skip
        yield _counter("qwend_prompt_tokens_evaluated", "Tokens of prompts that were evaluated.",
                       metrics.total.num_evaluated_tokens)  # fmt: skip
        yield _counter("qwend_tokens_generated", "Tokens of replies.",
                       metrics.total.num_generated_tokens)  # fmt: skip
        yield from _store_series(self._service.cache_stats(), "qwend_store")


def _store_series(stats: Mapping[str, Any], prefix: str) -> Iterator[Metric]:
    """A series a figure; a table of figures becomes one with a label, the audit a prefix."""
    for key, value in stats.items():
        name = f"{prefix}_{key.removeprefix('num_')}"
        text = key.replace("_", " ").removeprefix("num ").capitalize() + "."
        if key == "audit":
            yield from _store_series(value, "qwend_audit")
        elif isinstance(value, Mapping):
            family = GaugeMetricFamily(name, text, labels=["kind"])
            for kind, number in value.items():
                if isinstance(number, int | float):
                    family.add_metric([str(kind)], number)
            yield family
        elif isinstance(value, int | float):
            yield (_counter if key in _COUNTED else _gauge)(name, text, value)


def _labelled(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for kind, count in counts.items():
        family.add_metric([kind or "unknown"], count)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
