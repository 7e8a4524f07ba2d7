"""The end of the daemon: what is being built or generated then gets an answer, not a hang."""

import asyncio
import threading
from collections.abc import Callable

import httpx
import msgspec
from http_harness import ApiHarness

from daemon.api.app import create_app
from daemon.text.prompt import Prompt

MakeApi = Callable[..., ApiHarness]


class SlowPrompts:
    """A prompt builder that waits until it is let go."""

    def __init__(self) -> None:
        self.building = threading.Event()
        self.go = threading.Event()

    def build(self, *_: object) -> Prompt:
        self.building.set()
        assert self.go.wait(10)
        return Prompt(tokens=(1, 2), boundaries=(), generation=(2,), thinking_open=False)


def test_a_prompt_in_the_making_is_not_submitted(make_api: MakeApi) -> None:
    api = make_api()
    prompts = SlowPrompts()
    service = msgspec.structs.replace(api.service, prompts=prompts)
    slow = ApiHarness(create_app(service), service, api.engine, api.replies)

    async def run() -> httpx.Response:
        answer = asyncio.create_task(slow.post())
        assert await asyncio.to_thread(prompts.building.wait, 10)
        slow.app.state.generations.close()
        prompts.go.set()
        return await answer

    response = asyncio.run(run())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_stopped"
    assert api.engine.requests == []
