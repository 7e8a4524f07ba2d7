"""Who is let in: names, pages, keys; and how much a key may ask for."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from fakes import Script
from http_harness import ApiHarness

from daemon.api.access import AccessRules, local_hosts
from daemon.api.allowance import Allowances
from daemon.api.app import create_app
from daemon.errors import TooManyRequests

MakeApi = Callable[..., ApiHarness]
BODY = {"messages": [{"role": "user", "content": "hello"}]}


def ask(
    api: ApiHarness,
    rules: AccessRules,
    path: str = "/v1/chat/completions",
    *,
    method: str = "POST",
    host: str = "qwend",
    **headers: Any,
) -> httpx.Response:
    app = create_app(msgspec.structs.replace(api.service, access=rules))
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            body = BODY if method == "POST" else None
            return await client.request(method, path, json=body, headers=names)

    return asyncio.run(send())


# ── keys ──────────────────────────────────────────────────────────────────────────────────────

KEYS = AccessRules(keys=("first", "schlüssel"))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer  first "},
        {"x_api_key": "first"},
        {"x_api_key": "schlüssel".encode()},
    ],
)
def test_a_key_lets_in(make_api: MakeApi, headers: dict[str, Any]) -> None:
    assert ask(make_api(), KEYS, **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer firs"},
        {"authorization": "Bearer first2"},
        {"authorization": "Basic first"},
        {"x_api_key": ""},
        {"x_api_key": "FIRST"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_without_a_key_nothing_happens(
    make_api: MakeApi, headers: dict[str, str], path: str
) -> None:
    api = make_api()
    answer = ask(api, KEYS, path, **headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    kind = "authentication_error" if path == "/v1/messages" else "invalid_request_error"
    assert answer.json()["error"]["type"] == kind
    assert "first" not in answer.text
    assert api.engine.requests == []


@pytest.mark.parametrize("path", ["/", "/health", "/v1/health"])
def test_probes_need_no_key(make_api: MakeApi, path: str) -> None:
    assert ask(make_api(), KEYS, path, method="GET").status_code == 200
    assert ask(make_api(), KEYS, "/v1/models", method="GET").status_code == 401


# ── names and pages ───────────────────────────────────────────────────────────────────────────

LOCAL = AccessRules(hosts=local_hosts("127.0.0.1", ["box.lan"]))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("agent.localhost:8080", 200),
        ("box.lan", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8080", 403),
    ],
)
def test_only_its_own_names(make_api: MakeApi, host: str, status: int) -> None:
    """A page whose name was made to point here (DNS rebinding) asks by its own name."""
    assert ask(make_api(), LOCAL, host=host).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8080", 200),
        ("http://127.0.0.1:3000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("vscode-webview://abc", 403),
    ],
)
def test_pages_of_others_may_not_ask(make_api: MakeApi, origin: str, status: int) -> None:
    answer = ask(make_api(), LOCAL, host="127.0.0.1:8080", origin=origin)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_was_let_in(make_api: MakeApi) -> None:
    rules = AccessRules(origins=("https://app.example",), keys=("k",))
    page = {"origin": "https://app.example"}
    before = ask(
        make_api(),
        rules,
        method="OPTIONS",
        access_control_request_method="POST",
        access_control_request_headers="authorization",
        **page,
    )
    assert before.status_code == 200
    answer = ask(make_api(), rules, authorization="Bearer k", **page)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert ask(make_api(), rules, **page).status_code == 401
    other = ask(make_api(), rules, authorization="Bearer k", origin="https://evil.example")
    assert other.status_code == 403


# ── how much ──────────────────────────────────────────────────────────────────────────────────


def test_requests_a_minute() -> None:
    now = 0.0
    allowances = Allowances(6, None, lambda: now)

    def send(key: int) -> None:
        with allowances.taken_by(key):
            pass

    for _ in range(6):
        send(1)
    with pytest.raises(TooManyRequests) as refused:
        send(1)
    assert refused.value.retry_after_s == 10
    send(2)
    now = 9.9
    with pytest.raises(TooManyRequests):
        send(1)
    now = 10.1
    send(1)
    now = 10_000.0
    for _ in range(6):
        send(1)
    with pytest.raises(TooManyRequests):
        send(1)


def test_requests_at_the_same_time() -> None:
    allowances = Allowances(None, 2, lambda: 0.0)
    with allowances.taken_by(1), allowances.taken_by(1), allowances.taken_by(2):
        with pytest.raises(TooManyRequests), allowances.taken_by(1):
            pass
    with allowances.taken_by(1), allowances.taken_by(1):
        pass


def test_a_stream_counts_until_its_end(make_api: MakeApi) -> None:
    api = make_api(Script([5, 6], endless=True, step_s=0.01))
    rules = AccessRules(parallel_requests=1)
    app = create_app(msgspec.structs.replace(api.service, access=rules))

    async def both() -> tuple[Any, Any]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://qwend"
        ) as client:
            path = "/v1/chat/completions"
            first = asyncio.create_task(client.post(path, json=BODY | {"max_tokens": 30}))
            await asyncio.sleep(0.1)
            second = await client.post(path, json=BODY)
            return await first, second

    first, second = asyncio.run(both())
    assert first.status_code == 200
    assert second.status_code == 429
    assert second.headers["retry-after"] == "2"
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
