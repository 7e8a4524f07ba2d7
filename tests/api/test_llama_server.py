"""The endpoints that tools of llama-server's users ask for, in their shapes."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fakes import Script
from http_harness import USER, ApiHarness

from daemon.api.app import create_app
from daemon.api.service import ModelFacts, ReplyDefaults
from daemon.engine.requests import GenerationRequest
from daemon.metrics import Load
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]


def call(api: ApiHarness, method: str, path: str, **body: Any) -> Any:
    async def send() -> Any:
        async with api.client() as client:
            return await client.request(method, path, json=body or None)

    return asyncio.run(send())


def test_tokens_and_back(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api()
    text = "def f():\n    return 'é'<|im_end|>"
    tokens = call(api, "POST", "/tokenize", content=text).json()["tokens"]
    assert tokens == tokenizer.encode(text)
    assert call(api, "POST", "/detokenize", tokens=tokens).json() == {"content": text}
    plain = call(api, "POST", "/tokenize", content=text, parse_special=False).json()["tokens"]
    assert plain == tokenizer.encode(text, special=False)


def test_pieces(make_api: MakeApi) -> None:
    answer = call(make_api(), "POST", "/tokenize", content="a🦉", with_pieces=True)
    pieces = [entry["piece"] for entry in answer.json()["tokens"]]
    spelled = b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in pieces)
    assert spelled.decode() == "a🦉"
    assert any(isinstance(piece, list) for piece in pieces)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"content": 3}),
        ("/tokenize", {"text": "a"}),
        ("/tokenize", {"content": "a", "add_special": True}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/apply-template", {"messages": []}),
    ],
)
def test_what_is_wrong_is_named(make_api: MakeApi, path: str, body: dict[str, Any]) -> None:
    answer = call(make_api(), "POST", path, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]


def test_the_template_applied(make_api: MakeApi) -> None:
    api = make_api()
    off = {"enable_thinking": False}
    body = {"messages": USER, "chat_template_kwargs": off}
    prompt = call(api, "POST", "/apply-template", **body).json()["prompt"]
    assert prompt.startswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.endswith("</think>\n\n")
    assert api.engine.requests == []


def test_props(make_api: MakeApi) -> None:
    api = make_api()
    facts = ModelFacts("/models/m.gguf", "{{ messages }}")
    service = msgspec.structs.replace(api.service, facts=facts)
    api = ApiHarness(create_app(service), service, api.engine, api.replies)
    props = call(api, "GET", "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 32768
    assert props["default_generation_settings"]["params"]["top_k"] == 20
    assert props["total_slots"] == 8
    assert props["model_path"] == "/models/m.gguf"
    assert props["chat_template"] == "{{ messages }}"
    assert props["eos_token"]


def test_slots(make_api: MakeApi) -> None:
    api = make_api(Script([5, 6], endless=True, step_s=0.01))

    async def while_one_runs() -> tuple[Any, Any]:
        async with api.client() as client:
            body = {"messages": USER, "max_tokens": 20}
            running = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0.1)
            slots = (await client.get("/slots")).json()
            await running
            return slots, (await client.get("/slots?fail_on_no_slot=1")).json()

    during, after = asyncio.run(while_one_runs())
    assert [slot["is_processing"] for slot in during] == [True] + [False] * 7
    assert during[0]["n_prompt_tokens"] > 0
    assert "hello" not in str(during)
    assert not any(slot["is_processing"] for slot in after)
    saved = call(api, "POST", "/slots/0?action=save", filename="x")
    assert saved.status_code == 501
    assert "/v1/cache/sessions" in saved.json()["error"]["message"]


def test_who_waits_is_counted_and_has_no_slot(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    """Ten wait while eight are answered; then they are told to come back later."""

    def script(request: GenerationRequest) -> Script:
        waits = "later" in tokenizer.decode(request.tokens)
        return Script([5, 6], endless=True, step_s=0.001, hold_s=60.0 if waits else 0.0)

    api = make_api(script)

    async def crowd() -> tuple[Any, ...]:
        questions = ["now"] * 8 + ["later"] * 10
        async with api.client() as client, asyncio.TaskGroup() as group:
            bodies = [{"messages": [{**USER[0], "content": text}]} for text in questions]
            sent = [group.create_task(client.post("/chat/completions", json=b)) for b in bodies]
            while (await client.get("/health")).json()["running"] < 8:
                await asyncio.sleep(0.01)
            asked = [await client.get(f"/{what}") for what in ("health", "v1/cache/stats")]
            slots, full = [await client.get(f"/slots{q}") for q in ("", "?fail_on_no_slot=1")]
            metrics = (await client.get("/metrics")).text.splitlines()
            for task in sent:
                task.cancel()
        return [answer.json() for answer in asked], slots.json(), full.status_code, metrics

    counted, slots, full, metrics = asyncio.run(crowd())
    assert [(body["running"], body["waiting"]) for body in counted] == [(8, 10)] * 2
    assert [slot["is_processing"] for slot in slots] == [True] * 8
    assert full == 503
    assert {
        "qwend_requests_running 8.0",
        "qwend_requests_waiting 10.0",
        "llamacpp:requests_processing 8.0",
        "llamacpp:requests_deferred 10.0",
    } <= set(metrics)
    assert api.app.state.generations.load() == Load(0, 0)
    assert api.app.state.generations.slots.held() == {}


def test_a_reply_keeps_its_slot_when_another_ends(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    """The first ends between two that go on; who begins then sits in its place."""
    api = make_api(Script([5, 6], endless=True, step_s=0.001))

    async def lengths(client: Any, num_busy: int) -> list[int]:
        while True:
            slots = (await client.get("/slots")).json()
            found = [slot["n_prompt_tokens"] for slot in slots]
            if sum(slot["is_processing"] for slot in slots) == num_busy:
                return found
            await asyncio.sleep(0.005)

    async def crowd() -> tuple[list[int], ...]:
        async with api.client() as client, asyncio.TaskGroup() as group:

            def ask(words: int) -> Any:
                body = {"messages": [{"role": "user", "content": "now " * words}]}
                return group.create_task(client.post("/chat/completions", json=body))

            sent, seen = [], []
            for number in range(3):
                sent.append(ask(10 * (number + 1)))
                seen.append(await lengths(client, number + 1))
            sent[1].cancel()
            seen.append(await lengths(client, 2))
            sent.append(ask(50))
            seen.append(await lengths(client, 3))
            for task in sent:
                task.cancel()
        return tuple(seen)

    *_, three, two, again = asyncio.run(crowd())
    assert all(three[:3])
    assert two == [three[0], 0, three[2], *[0] * 5]
    assert (again[0], again[2]) == (three[0], three[2])
    assert again[1] > three[2]


def test_paths_without_a_version(make_api: MakeApi) -> None:
    api = make_api()
    chat = call(api, "POST", "/chat/completions", messages=USER)
    assert chat.json()["choices"][0]["message"]["content"] == "Hello!"
    assert call(api, "POST", "/completions", prompt="a").status_code == 200
    assert call(api, "GET", "/models").json() == call(api, "GET", "/v1/models").json()


# ── what a request does not say ───────────────────────────────────────────────────────────────


def with_defaults(api: ApiHarness, **defaults: Any) -> ApiHarness:
    service = msgspec.structs.replace(api.service, defaults=ReplyDefaults(**defaults))
    return ApiHarness(create_app(service), service, api.engine, api.replies)


def only_request(api: ApiHarness, **body: Any) -> GenerationRequest:
    answer = asyncio.run(api.post(**body))
    assert answer.status_code == 200, answer.text
    return api.engine.requests[-1]


def test_defaults_of_the_server_and_their_end(make_api: MakeApi) -> None:
    answer = "\n\nHello!"
    api = with_defaults(
        make_api(answer), template_options={"enable_thinking": False}, max_tokens=50
    )
    request = only_request(api)
    assert api.service.tokenizer.decode(request.tokens).endswith("</think>\n\n")
    assert request.max_tokens == 50
    asked = only_request(api, enable_thinking=True, max_tokens=60)
    assert api.service.tokenizer.decode(asked.tokens).endswith("<think>\n")
    assert asked.max_tokens == 60


def test_a_default_budget_of_thinking(make_api: MakeApi) -> None:
    api = with_defaults(make_api("Hm.\n</think>\n\nHi"), thinking_budget=100)
    assert only_request(api).constraint is not None
    assert only_request(api, enable_thinking=False).constraint is None
