"""tiny-coder's tokenizer and template, and a service around a scripted engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import RememberedReplies, Script, ScriptedEngine
from http_harness import ApiHarness, running_server

from daemon.api.app import create_app
from daemon.api.service import Limits, Service
from daemon.engine.requests import SamplingParams
from daemon.engine.weights.gguf import open_gguf
from daemon.metrics import Metrics
from daemon.text.constrainer import Constrainer
from daemon.text.prompt import PromptBuilder
from daemon.text.prompt_history import FrameShape, PromptHistory
from daemon.text.template import FRAME_END, FRAME_START, ChatTemplate
from daemon.text.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "daemon" / "embedded" / "tiny-coder-Q4_K_M.gguf"

MakeApi = Callable[..., ApiHarness]


@pytest.fixture(scope="session")
def metadata() -> dict[str, object]:
    return dict(open_gguf(MODEL).metadata)


@pytest.fixture(scope="session")
def tokenizer(metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata)


@pytest.fixture(scope="session")
def template(metadata: dict[str, object], tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(str(metadata["tokenizer.chat_template"]), tokenizer.control_tokens)


@pytest.fixture(scope="session")
def constrainer(tokenizer: Tokenizer) -> Iterator[Constrainer]:
    made = Constrainer(tokenizer)
    yield made
    made.close()


@pytest.fixture
def make_api(
    tokenizer: Tokenizer, template: ChatTemplate, constrainer: Constrainer
) -> Iterator[MakeApi]:
    """Makes an app whose model answers with `reply` (text, a Script, or a function to one)."""
    engines = []

    def make(
        reply: object = "\n</think>\n\nHello!",
        *,
        limits: Limits | None = None,
        **engine_options: int,
    ) -> ApiHarness:
        def script(request: object) -> Script:
            chosen = reply(request) if callable(reply) else reply
            if isinstance(chosen, Script):
                return chosen
            assert isinstance(chosen, str)
            return Script(tokenizer.encode(chosen), num_cached=3, num_kept=5)

        engine = ScriptedEngine(script, **engine_options)
        engines.append(engine)
        replies = RememberedReplies()
        shape = FrameShape(
            tokenizer.control_tokens[FRAME_START], tuple(tokenizer.encode(FRAME_END))
        )
        service = Service(
            engine=engine,
            engine_state=lambda: "ok",
            tokenizer=tokenizer,
            prompts=PromptBuilder(tokenizer, template, replies),
            constrainer=constrainer,
            remember=replies.remember,
            cache_stats=lambda: {"checkpoints": 0},
            metrics=Metrics(),
            history=PromptHistory(shape),
            sampling=SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
            limits=limits or Limits(),
            aliases=("qwen3.5-local",),
        )
        return ApiHarness(create_app(service), service, engine, replies)

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def serve() -> Iterator[Callable[[ApiHarness], str]]:
    """Serves an app on loopback; gives its URL."""
    with running_server() as start:
        yield start
