"""tiny-coder's tokenizer and template, and a service around a scripted engine."""

from collections.abc import Callable, Iterator

import pytest
from fakes import RememberedReplies, Script
from http_harness import ApiHarness, running_server
from scripted_app import TextSide, scripted_engine, scripted_service, text_side

from daemon.api.app import create_app
from daemon.api.service import Limits
from daemon.engine.requests import GenerationRequest
from daemon.text.tokenizer import Tokenizer

MakeApi = Callable[..., ApiHarness]


@pytest.fixture(scope="session")
def text() -> Iterator[TextSide]:
    made = text_side()
    yield made
    made.constrainer.close()


@pytest.fixture(scope="session")
def tokenizer(text: TextSide) -> Tokenizer:
    return text.tokenizer


@pytest.fixture
def make_api(text: TextSide) -> Iterator[MakeApi]:
    """Makes an app whose model answers with `reply` (text, a Script, or a function to one)."""
    engines = []

    def make(
        reply: object = "\n</think>\n\nHello!",
        *,
        limits: Limits | None = None,
        **engine_options: int,
    ) -> ApiHarness:
        def script(request: GenerationRequest) -> Script | str:
            chosen = reply(request) if callable(reply) else reply
            assert isinstance(chosen, Script | str)
            return chosen

        engine = scripted_engine(text, script, **engine_options)
        engines.append(engine)
        replies = RememberedReplies()
        service = scripted_service(text, engine, replies, limits)
        return ApiHarness(create_app(service), service, engine, replies)

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def serve() -> Iterator[Callable[[ApiHarness], str]]:
    """Serves an app on loopback; gives its URL."""
    with running_server() as start:
        yield start
