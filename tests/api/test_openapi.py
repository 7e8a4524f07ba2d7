"""The description of the API is complete, and what it describes is what is answered."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from http_harness import ApiHarness
from starlette.routing import Route

from daemon.api.openapi import OPERATIONS, description

MakeApi = Callable[..., ApiHarness]


def test_every_route_is_described(make_api: MakeApi) -> None:
    described = {(operation.method.upper(), operation.path) for operation in OPERATIONS}
    routes = [route for route in make_api().app.routes if isinstance(route, Route)]
    served = {(method, route.path) for route in routes for method in route.methods or ()}
    assert {pair for pair in served if pair[0] != "HEAD"} == described


def test_every_reference_leads_somewhere() -> None:
    whole = description()
    schemas = whole["components"]["schemas"]
    text = json.dumps(whole)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= schemas.keys()
    chat = schemas["ChatRequest"]["properties"]
    assert "greedy" in json.dumps(chat["temperature"])


def test_it_is_served(make_api: MakeApi) -> None:
    async def fetch() -> Any:
        async with make_api().client() as client:
            return (await client.get("/openapi.json")).json()

    assert asyncio.run(fetch()) == json.loads(json.dumps(description()))
