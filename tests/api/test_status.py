"""The routes that people and programs ask for health, model and statistics."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from http_harness import ApiHarness

from daemon.api.app import create_app

MakeApi = Callable[..., ApiHarness]


def get(api: ApiHarness, path: str, method: str = "GET") -> Any:
    async def send() -> Any:
        async with api.client() as client:
            return await client.request(method, path)

    return asyncio.run(send())


def test_root_answers_probes(make_api: MakeApi) -> None:
    api = make_api()
    assert get(api, "/").json()["model"] == "tiny-coder"
    probe = get(api, "/", "HEAD")
    assert (probe.status_code, probe.content) == (200, b"")


@pytest.mark.parametrize(("state", "status"), [("ok", 200), ("loading", 503), ("stopped", 503)])
def test_health_is_ok_only_when_requests_are_taken(
    make_api: MakeApi, state: str, status: int
) -> None:
    api = make_api()
    service = msgspec.structs.replace(api.service, engine_state=lambda: state)
    response = get(with_service(api, service), "/health")
    assert response.status_code == status
    assert response.json()["status"] == state


def with_service(api: ApiHarness, service: Any) -> ApiHarness:
    return ApiHarness(create_app(service), service, api.engine, api.replies)


def test_models_tell_the_context_length(make_api: MakeApi) -> None:
    api = make_api()
    body = get(api, "/v1/models").json()
    assert body["object"] == "list"
    [model] = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny-coder", "model", "qwend")
    assert model["context_length"] == model["max_model_len"] == 32768
    assert model["meta"]["n_ctx"] == 32768
    assert get(api, "/v1/models/tiny-coder").json() == model
    assert get(api, "/v1/models/other").status_code == 404


def test_cache_stats_add_up(make_api: MakeApi) -> None:
    api = make_api()
    for key in ("a", "a", "b"):
        assert asyncio.run(api.post(prompt_cache_key=key)).status_code == 200
    stats = get(api, "/v1/cache/stats").json()
    num_prompt = len(api.engine.requests[0].tokens)
    total = stats["total"]
    assert total["requests"] == 3
    assert total["tokens_reused"] == 9
    assert total["tokens_evaluated"] == 3 * (num_prompt - 3)
    assert total["hit_rate"] == round(9 / (3 * num_prompt), 4)
    assert stats["windows"]["60"] == total
    assert [(row["session"], row["requests"]) for row in stats["sessions"]] == [("b", 1), ("a", 2)]
    assert stats["store"] == {"checkpoints": 0}
    assert stats["running"] == 0


def test_probes_are_answered(make_api: MakeApi) -> None:
    async def probe() -> list[int]:
        async with make_api().client() as client:
            paths = ("/", "/api/hello", "/v1/models", "/v1/models/tiny-coder", "/health")
            return [(await client.head(path)).status_code for path in paths]

    assert asyncio.run(probe()) == [200] * 5


def test_what_a_text_model_cannot_do_is_refused(make_api: MakeApi) -> None:
    async def ask(path: str) -> Any:
        async with make_api().client() as client:
            return await client.post(path, json={"input": "x"})

    for path in ("/v1/embeddings", "/v1/images/generations", "/v1/audio/speech"):
        response = asyncio.run(ask(path))
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"{path} is not supported")
