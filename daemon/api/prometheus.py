"""GET /metrics: what the daemon did and what its store holds, for Prometheus.

Owns the names of the series and the histograms; sums come from metrics and the store when they are
asked for. Observations come from any thread, the route runs on the event loop.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from daemon.api.generations import Generations
from daemon.api.service import Service
from daemon.metrics import RequestRecord

PROMPT_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
QUEUE_BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
TOKEN_BUCKETS_S = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.3)

TIERS = ("device", "host", "disk")
"""Where reused tokens come from; each has its series from the start, so that sums are right."""


class Series(Struct, frozen=True):
    """One figure as Prometheus sees it. `label` is what a table of figures is labelled with."""

    name: str
    help: str
    is_counter: bool = False
    label: str = ""


STORE_SERIES = {
    "num_checkpoints": Series("checkpoints", "Checkpoints in the store, waiting ones included."),
    "checkpoints_by_reason": Series(
        "checkpoints_by_reason", "Checkpoints by why they were placed where they are.",
        label="reason",
    ),
    "checkpoints_by_birth": Series(
        "checkpoints_by_birth",
        "Checkpoints by birth: by prompt evaluation (reusable by all), or by decoding.",
        label="birth",
    ),
    "num_pages": Series("pages", "Pages of 64 tokens of keys and values, each stored once."),
    "num_bytes": Series("bytes", "Bytes that all checkpoints take, on disk or on the way there."),
    "budget_bytes": Series("budget_bytes", "Bytes that the store may take on disk."),
    "queue_bytes": Series("queue_bytes", "Bytes that wait for the disk: a kill costs these."),
    "memory_bytes": Series("memory_bytes", "Bytes kept in host memory beside the disk."),
    "num_sampled_replies": Series(
        "sampled_replies", "Replies whose sampled tokens are remembered for exact replay."
    ),
    "num_written": Series("written", "Checkpoints that were written to disk.", is_counter=True),
    "written_bytes": Series("written_bytes", "Bytes of written checkpoints.", is_counter=True),
    "num_dropped": Series(
        "dropped", "Checkpoints given up before they were on disk: no room, or no time.",
        is_counter=True,
    ),
    "num_damaged": Series(
        "damaged", "Records that failed a check when read; each was dropped, its tokens evaluated.",
        is_counter=True,
    ),
    "num_evicted": Series(
        "evicted", "Checkpoints removed from disk to stay within the budget.", is_counter=True
    ),
    "num_superseded": Series(
        "superseded", "Checkpoints never written because a later one of their conversation came.",
        is_counter=True,
    ),
}  # fmt: skip
"""By the names of the store's figures; see `CacheStats`."""

LEDGER_SERIES = {
    "today_bytes": Series("written_today_bytes", "Bytes written to disk since midnight, UTC."),
    "daily_budget_bytes": Series("daily_budget_bytes", "Bytes that may be written in a day."),
    "sharing": Series(
        "sharing_ratio", "Bytes that checkpoints would take without shared pages, per byte written."
    ),
}  # fmt: skip
"""By the names of the write ledger's figures; see `WriteStats`."""

BUFFER_SERIES = {
    "pinned_bytes": Series(
        "pinned_bytes", "Bytes of host memory pinned for checkpoints to and from the GPU."
    ),
    "num_unpinned": Series(
        "unpinned",
        "Times that no pinned buffer was ready: these copies take about five times as long.",
        is_counter=True,
    ),
}  # fmt: skip
"""By the names of the backend's figures; see `HostBuffers`."""

AUDIT_SERIES = {
    "share": Series("share", "Share of resumed requests that is to be evaluated again, cold."),
    "num_waiting": Series("waiting", "Audits that wait for the device to be idle, or run."),
    "num_compared": Series(
        "compared", "Audits that came to an end: resumed and cold were compared.", is_counter=True
    ),
    "num_mismatches": Series(
        "mismatches", "Audits whose checkpoint did not equal a cold evaluation; it was dropped.",
        is_counter=True,
    ),
    "num_abandoned": Series(
        "abandoned", "Audits given up: more came than the idle device could do, or it failed.",
        is_counter=True,
    ),
}  # fmt: skip
"""By the names of the audit's figures; see `AuditCounts`."""


class Prometheus:
    """The endpoint, and the series that need every request."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Sums(service, generations))
        self._queue_s = Histogram(
            "qwend_queue_seconds", "Seconds from a request's arrival until its evaluation began.",
            buckets=QUEUE_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._prompt_s = Histogram(
            "qwend_prompt_seconds", "Seconds in which a prompt was evaluated, without waiting.",
            buckets=PROMPT_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._token_s = Histogram(
            "qwend_token_seconds", "Seconds between tokens of a reply, the mean of each request.",
            buckets=TOKEN_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        service.metrics.listen(self._observe)

    async def metrics(self, request: Request) -> Response:
        """All series, in the form that the client accepts."""
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"content-type": kind})

    def _observe(self, record: RequestRecord) -> None:
        if record.queue_ms is not None:
            self._queue_s.observe(record.queue_ms / 1e3)
        if record.prompt_ms:
            self._prompt_s.observe(record.prompt_ms / 1e3)
        if record.num_generated_tokens > 1 and record.decode_ms:
            self._token_s.observe(record.decode_ms / 1e3 / (record.num_generated_tokens - 1))


class _Sums(Collector):
    """What others count already."""

    def __init__(self, service: Service, generations: Generations) -> None:
        self._service = service
        self._generations = generations

    def collect(self) -> Iterator[Metric]:
        """The series at this moment."""
        metrics, info = self._service.metrics.snapshot(), self._service.engine.info
        build = GaugeMetricFamily(
            "qwend_info",
            "Always 1; its labels say what is served, by which version, on what.",
            labels=["version", "model", "backend"],
        )
        build.add_metric([self._service.version, info.model_name, info.backend], 1)
        yield build
        yield _labelled(
            "qwend_requests", "Requests that have ended, by how.", "finish", metrics.finishes
        )
        yield _labelled(
            "qwend_prompt_tokens_reused",
            "Tokens of prompts that were not evaluated again, by where they came from.",
            "tier",
            dict.fromkeys(TIERS, 0) | metrics.reused,
        )
        yield _labelled(
            "qwend_prompt_tokens_lost",
            "Tokens of prompts evaluated again though they had been before, by cause.",
            "cause",
            metrics.lost,
        )
        yield _counter(
            "qwend_requests_followed",
            "Requests that waited for one in flight to evaluate what both begin with.",
            metrics.num_followed,
        )
        load = self._generations.load()
        yield _gauge("qwend_requests_running", "Requests that are being answered.",
                     load.num_running)  # fmt: skip
        yield _gauge("qwend_requests_waiting", "Requests whose evaluation has not begun.",
                     load.num_waiting)  # fmt: skip
        # llama-server's names of the same two, which monitors made for it read.
        yield _gauge("llamacpp:requests_processing", "Number of requests processing.",
                     load.num_running)  # fmt: skip
        yield _gauge("llamacpp:requests_deferred", "Number of requests deferred.",
                     load.num_waiting)  # fmt: skip
        yield _counter("qwend_prompt_tokens_evaluated", "Tokens of prompts that were evaluated.",
                       metrics.total.num_evaluated_tokens)  # fmt: skip
        yield _counter("qwend_tokens_generated", "Tokens of replies that were sampled.",
                       metrics.total.num_generated_tokens)  # fmt: skip
        stats = self._service.cache_stats()
        yield from _series("qwend_store", STORE_SERIES, stats)
        yield from _series("qwend_store", LEDGER_SERIES, stats.get("writes", {}))
        yield from _series("qwend_store", BUFFER_SERIES, stats.get("buffers", {}))
        yield from _series("qwend_audit", AUDIT_SERIES, stats.get("audit", {}))


def _series(
    prefix: str, known: Mapping[str, Series], figures: Mapping[str, Any]
) -> Iterator[Metric]:
    """The figures that there are, under the names of their series."""
    for key, series in known.items():
        value = figures.get(key)
        name = f"{prefix}_{series.name}"
        if series.label and value is not None:
            family = GaugeMetricFamily(name, series.help, labels=[series.label])
            for kind, number in value.items():
                family.add_metric([kind], number)
            yield family
        elif value is not None:
            yield (_counter if series.is_counter else _gauge)(name, series.help, value)


def _labelled(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for kind, count in counts.items():
        family.add_metric([kind or "unknown"], count)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
