"""What a request is told about its reuse: in a header, in the answer, later by its id, and before
it is sent. The scripted engine restores what it is told to; nearest prompts are real."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from fakes import Script
from http_harness import USER, ApiHarness, events

from daemon.api.access import AccessRules
from daemon.api.app import create_app
from daemon.api.cache_plan import CachePlan
from daemon.api.conversation import Conversation
from daemon.api.reply import ReplyRules
from daemon.engine.requests import SamplingParams
from daemon.text.messages import Message

MakeApi = Callable[..., ApiHarness]

SYSTEM = {"role": "system", "content": "Today is Monday. " + "Be careful. " * 40}
TUESDAY = {**SYSTEM, "content": SYSTEM["content"].replace("Monday", "Tuesday")}
EXPLAIN = {"cache": {"explain": True}}


def post(api: ApiHarness, **body: Any) -> httpx.Response:
    return asyncio.run(api.post(**body))


def get(api: ApiHarness, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with api.client() as client:
            return await client.get(path)

    return asyncio.run(ask())


def plan(api: ApiHarness, path: str = "/v1/cache/plan", **body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with api.client() as client:
            return await client.post(path, content=json.dumps(body))

    return asyncio.run(ask())


def test_the_date_changed_in_the_system_prompt(make_api: MakeApi) -> None:
    api = make_api()
    first = post(api, messages=[SYSTEM, *USER])
    answer = post(api, messages=[TUESDAY, *USER], **EXPLAIN)
    told = answer.json()["cache_plan"]
    assert told["cause"] == "system_changed"
    difference = told["difference"]
    assert (difference["message"], difference["role"], difference["part"]) == (
        0,
        "system",
        "system",
    )
    assert difference["shared"].endswith("Today is")
    assert difference["before"].startswith(" Monday.")
    assert difference["after"].startswith(" Tuesday.")
    assert told["nearest"]["request"] == first.headers["x-request-id"]
    assert told["nearest"]["common_tokens"] == difference["position"]
    assert told["lost_tokens"] + told["new_tokens"] == told["evaluated_tokens"]
    assert told["lost_tokens"] > told["new_tokens"]
    assert told["lost_s"] > 0
    assert "message 0 (system, system)" in told["summary"]


def test_another_prompt_of_the_session_is_new_however_it_begins(make_api: MakeApi) -> None:
    api = make_api()
    for text in ("Make a title. " * 20, "Answer the question. " * 20):
        answer = post(api, messages=[{"role": "user", "content": text}], prompt_cache_key="one")
        assert "cause=never_seen" in answer.headers["x-cache-plan"]


def test_the_header_is_one_line_without_text(make_api: MakeApi) -> None:
    api = make_api()
    first = (post(api, messages=[SYSTEM, *USER])).headers["x-cache-plan"]
    assert "cause=never_seen" in first
    second = (post(api, messages=[TUESDAY, *USER])).headers["x-cache-plan"]
    fields = dict(field.split("=") for field in second.split("; "))
    assert fields["cause"] == "system_changed"
    assert fields["message"] == "0"
    assert int(fields["new"]) + int(fields["lost"]) == int(fields["evaluated"])
    assert "Tuesday" not in second


def test_a_streams_header_says_that_it_is_foreseen(make_api: MakeApi) -> None:
    api = make_api()
    assert post(api, stream=True).headers["x-cache-plan"].startswith("foreseen=yes; restored=0")
    assert "foreseen" not in post(api).headers["x-cache-plan"]


def test_only_who_asks_gets_it_in_the_answer(make_api: MakeApi) -> None:
    api = make_api()
    assert "cache_plan" not in (post(api)).json()
    streamed = events((post(api, stream=True)).text)
    assert not any("cache_plan" in event for event in streamed)
    asked = events((post(api, stream=True, **EXPLAIN)).text)
    assert [event for event in asked if "cache_plan" in event] == asked[-1:]
    assert asked[-1]["cache_plan"]["status"] == "ended"
    assert asked[-1]["usage"]["prompt_tokens"] == asked[-1]["cache_plan"]["prompt_tokens"]


def test_with_several_keys_nobody_sees_the_text_of_another_session(make_api: MakeApi) -> None:
    harness = make_api()
    access = AccessRules(keys=("one", "two"))
    service = msgspec.structs.replace(harness.service, access=access)
    api = ApiHarness(create_app(service), service, harness.engine, harness.replies)

    def ask(key: str, session: str, **body: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with api.client() as client:
                return await client.request(
                    "POST" if body else "GET",
                    "/v1/chat/completions" if body else "/v1/cache/requests",
                    headers={"authorization": f"Bearer {key}"},
                    content=json.dumps({**body, **EXPLAIN, "prompt_cache_key": session}),
                )

        return asyncio.run(send())

    ask("one", "mine", messages=[SYSTEM, *USER])
    told = ask("two", "yours", messages=[TUESDAY, *USER]).json()["cache_plan"]
    assert (told["nearest"]["session"], told["nearest"]["request"]) == ("", "")
    assert told["difference"]["after"].startswith(" Tuesday.")
    assert told["difference"]["before"] == ""
    listed = ask("two", "yours").json()["data"]
    texts = [plan["difference"]["after"] for plan in listed if plan["difference"]]
    assert texts
    assert not any(texts)


def test_a_plan_is_kept_and_found_by_either_id(make_api: MakeApi) -> None:
    api = make_api()
    answer = post(api)
    request_id = answer.headers["x-request-id"]
    kept = get(api, f"/v1/cache/requests/{request_id}")
    assert kept.json()["status"] == "ended"
    assert (get(api, f"/v1/cache/requests/{answer.json()['id']}")).json() == kept.json()
    assert (get(api, "/v1/cache/requests")).json()["data"] == [kept.json()]
    unknown = get(api, "/v1/cache/requests/unknown")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")


def test_a_dry_run_evaluates_and_remembers_nothing(make_api: MakeApi) -> None:
    api = make_api()
    post(api, messages=[SYSTEM, *USER])
    for _ in range(2):
        told = (plan(api, messages=[TUESDAY, *USER])).json()
        assert (told["status"], told["cause"]) == ("dry_run", "system_changed")
    assert len(api.engine.requests) == 1
    assert len((get(api, "/v1/cache/requests")).json()["data"]) == 1


def test_a_dry_run_refuses_what_an_answer_would(make_api: MakeApi) -> None:
    api = make_api()
    assert (plan(api, messages=[])).status_code == 400
    assert (plan(api, messages=USER, model="other")).status_code == 404
    long = plan(make_api(context_length=64), messages=[{"role": "user", "content": "word " * 80}])
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    unknown = plan(api, "/v1/cache/plan?dialect=morse", messages=USER)
    assert unknown.json()["error"]["param"] == "dialect"


def test_a_cancelled_request_says_so_to_the_next(make_api: MakeApi) -> None:
    api = make_api(Script(prefill_steps=10_000, step_s=0.01))
    generations = api.app.state.generations
    talk = Conversation(messages=(Message(role="user", content="word " * 400),))

    async def leave_and_ask() -> tuple[str, CachePlan]:
        first = await generations.start(talk, ReplyRules(sampling=SamplingParams()))
        first.close()
        return first.id, await generations.plan(talk)

    first_id, told = asyncio.run(leave_and_ask())
    assert told.nearest is not None
    assert (told.cause, told.nearest.state) == ("cancelled", "cancelled")
    assert "again" not in told.summary
    left = generations.plans.find(first_id)
    assert (left.status, left.evaluated_tokens, left.prompt_s) == ("cancelled", 0, 0.0)


BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [SYSTEM, *USER]},
    "messages": {"system": SYSTEM["content"], "messages": USER, "max_tokens": 9, "model": ""},
    "responses": {"instructions": SYSTEM["content"], "input": USER},
    "completions": {"prompt": "def add(a, b):\n" * 20},
}


@pytest.mark.parametrize("dialect", BODIES)
def test_a_dry_run_of_every_dialect(make_api: MakeApi, dialect: str) -> None:
    api = make_api()
    body = BODIES[dialect]
    told = plan(api, f"/v1/cache/plan?dialect={dialect}", **body)
    assert told.status_code == 200, told.text
    assert (told.json()["status"], told.json()["cause"]) == ("dry_run", "never_seen")
    if dialect != "messages":
        assert plan(api, **body).json()["prompt_tokens"] == told.json()["prompt_tokens"]
    assert api.engine.requests == []


def test_where_a_client_cut_a_result_the_later_ones_have_a_boundary_at_once(
    make_api: MakeApi,
) -> None:
    api = make_api()

    def step(number: int, size: int) -> list[dict[str, Any]]:
        function = {"name": "read", "arguments": "{}"}
        call = {"id": f"c{number}", "type": "function", "function": function}
        text = "".join(f"{number} line {line}\n" for line in range(200))[:size]
        return [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": text},
        ]

    post(api, messages=[*USER, *step(1, 2000), *step(2, 2000)])
    post(api, messages=[*USER, *step(1, 900), *step(2, 2000)])
    counts = [
        sum(boundary.reason == "tool" for boundary in request.boundaries)
        for request in api.engine.requests
    ]
    assert counts == [2, 3]
