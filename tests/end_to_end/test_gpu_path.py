"""From a request to an answer on a GPU that computes nothing: all of the path but the kernels.

Weights are packed, batches recorded, tokens sampled, snapshots saved and restored by the code that
does so on a card; the driver under it only moves bytes, so a reply is a row of token 0.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

pytest.importorskip("cuda.core")

from fake_driver import FakeDriver, install
from starlette.testclient import TestClient
from stream_driver import StreamDriver

from daemon.assemble import assemble
from daemon.config import CacheConfig, Config, EngineConfig, ModelConfig

MESSAGES = [
    {"role": "system", "content": "Answer briefly. " * 100},
    {"role": "user", "content": "What is a page? " * 30},
]
KERNELS = (
    "quant_pack quant_gemm quant_gemv quant_activations delta_prepare delta_scan delta_gate "
    "delta_step kv_append attention_prefill_wgmma attention_decode attention_decode_merge "
    "embed_tiles sample"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def config(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled))
    return Config(
        model=ModelConfig(),
        engine=EngineConfig(device="cuda", context=4096, key_format="q8_0", value_format="q4_0"),
        cache=CacheConfig(folder=tmp_path / "store"),
    )


def ask(client: TestClient, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 70, **options}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    usage: dict[str, Any] = answer.json()["usage"]
    return usage


def test_answers_batches_and_resumes_also_after_a_restart(
    config: Config, fake_driver: FakeDriver
) -> None:
    fake_driver.free_bytes = 4 * 2**30
    talk_restart_and_talk(config, fake_driver)


def test_a_cut_inside_a_tools_result_costs_a_page(config: Config, fake_driver: FakeDriver) -> None:
    """Where the card has room for states inside messages, and the store has them far apart; the dry
    run knows of them."""
    sparse = msgspec.structs.replace(config.cache, interval_tokens=4096)
    config = msgspec.structs.replace(config, cache=sparse)
    fake_driver.free_bytes = 4 * 2**30
    result = "\n".join(f"line {number} of a long file" for number in range(150))
    call = {"id": "1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": result},
    ]
    shorter = [*history[:-1], {**history[-1], "content": result[:900] + " (cut)"}]
    with assemble(config) as daemon, TestClient(daemon.app(), "http://127.0.0.1") as client:
        ask(client, history)
        body = {"messages": shorter, "max_tokens": 70}
        planned = client.post("/v1/cache/plan", json=body).json()
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
    plan = dict(part.split("=") for part in answer.headers["x-cache-plan"].split("; "))
    assert plan["tier"] == "device"
    assert int(plan["lost"]) < 64
    assert planned["restored"]["tier"] == "device"
    assert planned["restored"]["tokens"] == int(plan["restored"])


def test_nobody_waits_for_ever_where_copies_take_their_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuda.bindings import driver

    late = StreamDriver(driver, Random(5))
    late.free_bytes = 4 * 2**30
    install(late, monkeypatch)
    with late.running():
        talk_restart_and_talk(config, late)


def talk_restart_and_talk(config: Config, fake_driver: FakeDriver) -> None:
    with assemble(config) as daemon, TestClient(daemon.app(), "http://127.0.0.1") as client:
        first = ask(client, MESSAGES)
        assert first["completion_tokens"] == 70
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        again = ask(client, MESSAGES, n=1, logprobs=True, top_logprobs=3)
        reused = again["prompt_tokens_details"]["cached_tokens"]
        assert first["prompt_tokens"] - reused <= 64
        ask(client, MESSAGES, response_format={"type": "json_object"})
        store = client.get("/v1/cache/stats").json()["store"]
        assert store["buffers"].keys() == {"pinned_bytes", "num_unpinned"}
        assert "qwend_store_pinned_bytes " in client.get("/metrics").text
        assert set(KERNELS.split()) <= set(fake_driver.launched)
    longer = [*MESSAGES, {"role": "assistant", "content": "64 tokens."}, MESSAGES[1]]
    with assemble(config) as daemon, TestClient(daemon.app(), "http://127.0.0.1") as client:
        resumed = ask(client, longer)
    assert resumed["prompt_tokens_details"]["cached_tokens"] >= reused
