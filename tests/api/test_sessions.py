"""/v1/cache/sessions over a real store: what is listed, changed, moved, and refused."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cache.cache_harness import MODEL, open_cache, prompt
from fakes import Script
from http_harness import ApiHarness

from daemon.api.app import create_app
from daemon.cache.checkpoint_cache import CheckpointCache
from daemon.checkpoint import Snapshot
from daemon.errors import SessionFileError

MakeApi = Callable[..., ApiHarness]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[CheckpointCache]:
    cache = open_cache(tmp_path / "store")
    for number, session in enumerate(("shop/main", "side")):
        timeline = cache.timeline(prompt(2, number), session)
        timeline.save(Snapshot(64, "prompt", 1, b"state", {0: b"page"}), "system")
        timeline.save(Snapshot(128, "prompt", 2, b"state", {1: b"page"}), "prompt")
    cache.flush()
    yield cache
    cache.close()


@pytest.fixture
def api(make_api: MakeApi, cache: CheckpointCache) -> ApiHarness:
    harness = make_api()
    service = msgspec.structs.replace(
        harness.service, sessions=cache.catalogue, suggest_title=cache.suggest_title
    )
    return ApiHarness(create_app(service), service, harness.engine, harness.replies)


def call(
    api: ApiHarness, method: str, path: str = "", body: Any = None, content: bytes | None = None
) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with api.client() as client:
            given = content if body is None else json.dumps(body).encode()
            return await client.request(method, f"/v1/cache/sessions{path}", content=given)

    return asyncio.run(ask())


def test_list_and_look(api: ApiHarness) -> None:
    rows = call(api, "GET").json()["data"]
    assert {row["session"] for row in rows} == {"shop/main", "side"}
    by_name = call(api, "GET", "/shop/main").json()
    assert by_name in rows
    assert call(api, "GET", f"/{by_name['id']}").json() == by_name
    assert (by_name["num_tokens"], len(by_name["checkpoints"])) == (128, 2)
    assert by_name["model"] == MODEL.hex()
    missing = call(api, "GET", "/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "session_not_found")


def test_the_first_question_is_the_title(api: ApiHarness) -> None:
    side = [{"role": "user", "content": "Generate a title for this."}]
    tree = {"role": "user", "content": "<environment>\na tree\n</environment>"}
    question = {"role": "user", "content": "<note>x</note>\nFix the parser, please.\nAnd hurry."}
    tool = {"type": "function", "function": {"name": "look"}}
    asyncio.run(api.post(messages=side, prompt_cache_key="side"))
    assert call(api, "GET", "/side").json()["title"] == "Generate a title for this."
    asyncio.run(api.post(messages=[tree, question], tools=[tool], prompt_cache_key="side"))
    assert call(api, "GET", "/side").json()["title"] == "Fix the parser, please."


def test_rename_pin_and_fork(api: ApiHarness) -> None:
    changed = call(api, "PATCH", "/side", {"title": "Aside", "pinned": True}).json()
    assert (changed["title"], changed["is_pinned"]) == ("Aside", True)
    fork = call(api, "POST", "/side/fork", {"session": "aside", "position": 100})
    assert fork.status_code == 201
    assert (fork.json()["num_tokens"], fork.json()["parents"]) == (64, [changed["id"]])
    assert call(api, "POST", "/side/fork", {"session": "aside"}).status_code == 400
    assert call(api, "PATCH", "/side", {"pin": True}).json()["error"]["param"] == "pin"


def test_export_wipe_import(api: ApiHarness) -> None:
    exported = call(api, "GET", "/shop/main/export")
    assert exported.status_code == 200
    assert ".qwend-session" in exported.headers["content-disposition"]
    wiped = call(api, "DELETE", "/shop/main").json()["wiped"]
    assert wiped["session"] == "shop/main"
    assert call(api, "GET", "/shop/main").status_code == 404
    back = call(api, "POST", "/import?session=back", content=exported.content)
    assert (back.status_code, back.json()["num_tokens"]) == (201, 128)
    refused = call(api, "POST", "/import", content=exported.content[:-1])
    assert refused.json()["error"]["code"] == "session_file_refused"
    folder = api.service.sessions.folder  # type: ignore[union-attr]
    assert not list(folder.glob("import-*"))


def respond(api: ApiHarness, method: str, path: str = "", **body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with api.client() as client:
            return await client.request(method, f"/v1/responses{path}", json=body or None)

    return asyncio.run(ask())


def test_a_wipe_forgets_stored_responses(api: ApiHarness) -> None:
    kept = [respond(api, "POST", input="hello", prompt_cache_key=name) for name in ("side", "b")]
    call(api, "DELETE", "/side")
    found = [respond(api, "GET", f"/{answer.json()['id']}").status_code for answer in kept]
    assert found == [404, 200]


def test_a_wipe_forgets_prompts_and_plans(api: ApiHarness) -> None:
    words = {"messages": [{"role": "user", "content": "secret " * 80}], "prompt_cache_key": "side"}
    asyncio.run(api.post(**words))
    assert len(api.service.history) == 1
    call(api, "DELETE", "/side")
    assert len(api.service.history) == 0
    assert api.app.state.generations.plans.latest(9) == []


def test_a_request_that_is_answered_meanwhile_leaves_nothing(
    make_api: MakeApi, cache: CheckpointCache
) -> None:
    harness = make_api(Script(tokens=(5, 6, 7), hold_s=0.1))
    service = msgspec.structs.replace(harness.service, sessions=cache.catalogue)
    api = ApiHarness(create_app(service), service, harness.engine, harness.replies)

    async def wipe_meanwhile() -> list[httpx.Response]:
        async with api.client() as client:
            body = {"input": "secret", "prompt_cache_key": "side"}
            answer = asyncio.create_task(client.post("/v1/responses", json=body))
            while not api.engine.requests:
                await asyncio.sleep(0.001)
            wiped = await client.delete("/v1/cache/sessions/side")
            answered = await answer
            stored = await client.get(f"/v1/responses/{answered.json()['id']}")
            return [wiped, answered, stored]

    assert [answer.status_code for answer in asyncio.run(wipe_meanwhile())] == [200, 200, 404]
    assert len(api.engine.requests) == 1
    assert (len(api.service.history), api.app.state.generations.plans.latest(9)) == (0, [])


def test_an_export_that_fails_on_the_way_is_never_taken_for_whole(
    make_api: MakeApi,
    cache: CheckpointCache,
    serve: Callable[[ApiHarness], str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaking(name: str) -> Iterator[bytes]:
        yield b"head"
        raise SessionFileError(f"{name} cannot be exported.")

    monkeypatch.setattr(cache.catalogue, "export", breaking)
    harness = make_api()
    service = msgspec.structs.replace(harness.service, sessions=cache.catalogue)
    url = serve(ApiHarness(create_app(service), service, harness.engine, harness.replies))
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{url}/v1/cache/sessions/side/export")
    assert "side cannot be exported." in caplog.messages
    assert not any(record.exc_info for record in caplog.records)


def test_without_a_store_there_are_none(make_api: MakeApi) -> None:
    answer = call(make_api(), "GET")
    assert answer.status_code == 404
    assert "--no-cache" in answer.json()["error"]["message"]
