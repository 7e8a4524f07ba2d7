"""/metrics as Prometheus reads it."""

import asyncio
from collections.abc import Callable, Mapping

import msgspec
from http_harness import USER, ApiHarness
from prometheus_client.parser import text_string_to_metric_families

from daemon.api.app import create_app
from daemon.api.prometheus import AUDIT_SERIES, BUFFER_SERIES, LEDGER_SERIES, STORE_SERIES
from daemon.audit import AuditCounts
from daemon.cache.checkpoint_cache import CacheStats
from daemon.cache.write_ledger import WriteStats
from daemon.engine.backends.backend import HostBuffers
from daemon.metrics import RequestRecord

MakeApi = Callable[..., ApiHarness]
Labels = frozenset[tuple[str, str]]


def scrape(api: ApiHarness) -> Mapping[tuple[str, Labels], float]:
    async def get() -> str:
        async with api.client() as client:
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            return answer.text

    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(asyncio.run(get()))
        for sample in family.samples
    }


def value(samples: Mapping[tuple[str, Labels], float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_what_requests_did(make_api: MakeApi) -> None:
    api = make_api()
    system = {"role": "system", "content": "Monday. " + "Be careful. " * 60}
    for messages in ([system, *USER], [{**system, "content": "Tue" + system["content"]}, *USER]):
        asyncio.run(api.post(messages=messages))
    samples = scrape(api)
    assert value(samples, "qwend_requests_total", finish="stop") == 2
    assert value(samples, "qwend_requests_running") == 0
    assert value(samples, "qwend_requests_waiting") == 0
    assert value(samples, "qwend_queue_seconds_count") == 2
    assert value(samples, "qwend_prompt_tokens_reused_total", tier="unknown") == 6
    assert value(samples, "qwend_prompt_tokens_evaluated_total") > 100
    assert value(samples, "qwend_prompt_tokens_lost_total", cause="system_changed") > 60
    assert value(samples, "qwend_prompt_seconds_count") == 2
    assert value(samples, "qwend_prompt_seconds_bucket", le="0.03") == 2
    assert value(samples, "qwend_token_seconds_count") == 2
    assert value(samples, "qwend_info", version="0", model="tiny-coder", backend="scripted") == 1


def test_what_the_store_holds(make_api: MakeApi) -> None:
    harness = make_api()
    stats = {
        "num_evicted": 3,
        "num_bytes": 70,
        "checkpoints_by_reason": {"user": 2},
        "audit": {"share": 0.5, "num_mismatches": 1},
        "buffers": {"pinned_bytes": 4096, "num_unpinned": 2},
        "writes": {"today_bytes": 9, "daily_budget_bytes": None, "sharing": 1.5, "by_day": {}},
    }
    service = msgspec.structs.replace(harness.service, cache_stats=lambda: stats)
    samples = scrape(ApiHarness(create_app(service), service, harness.engine, harness.replies))
    assert value(samples, "qwend_store_evicted_total") == 3
    assert value(samples, "qwend_store_bytes") == 70
    assert value(samples, "qwend_store_checkpoints_by_reason", reason="user") == 2
    assert value(samples, "qwend_store_written_today_bytes") == 9
    assert value(samples, "qwend_store_sharing_ratio") == 1.5
    assert ("qwend_store_daily_budget_bytes", frozenset()) not in samples
    assert value(samples, "qwend_audit_mismatches_total") == 1
    assert value(samples, "qwend_audit_share") == 0.5
    assert value(samples, "qwend_store_pinned_bytes") == 4096
    assert value(samples, "qwend_store_unpinned_total") == 2


def test_tiers(make_api: MakeApi) -> None:
    api = make_api()
    record = RequestRecord(
        id="r",
        model="m",
        session="s",
        num_prompt_tokens=10,
        num_cached_tokens=8,
        num_evaluated_tokens=2,
        num_generated_tokens=0,
        prompt_ms=0.0,
        decode_ms=0.0,
        finish="cancelled",
        tier="host",
    )
    api.service.metrics.request_ended(record)
    samples = scrape(api)
    assert value(samples, "qwend_prompt_tokens_reused_total", tier="host") == 8
    assert value(samples, "qwend_prompt_tokens_reused_total", tier="device") == 0
    assert value(samples, "qwend_prompt_tokens_reused_total", tier="disk") == 0
    assert value(samples, "qwend_prompt_seconds_count") == 0
    assert value(samples, "qwend_queue_seconds_count") == 0


def test_every_figure_has_a_series_and_every_series_a_sentence() -> None:
    without = {"writes", "by_day", "today_by_session"}
    """A table of its own; and what is for /v1/cache/stats, since sessions are without bound."""
    for known, figures in (
        (STORE_SERIES, CacheStats),
        (LEDGER_SERIES, WriteStats),
        (AUDIT_SERIES, AuditCounts),
        (BUFFER_SERIES, HostBuffers),
    ):
        assert known.keys() == set(figures.__struct_fields__) - without
        for series in known.values():
            assert series.help.endswith(".")
            assert len(series.help.split()) >= 4
