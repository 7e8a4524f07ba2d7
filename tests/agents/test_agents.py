"""Real agents, driven over two user turns with a loop of tools, against a scripted model.

`make test-agents` installs them into `.agents/` and runs this; nothing else does.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_commands import AGENTS, CONTEXT, Agent, Workplace
from fakes import RememberedReplies, Script, ScriptedEngine
from http_harness import serving
from scripted_app import TextSide, scripted_engine, scripted_service, text_side
from scripted_coder import ASK, FIX, FIXED, TOLD, Coder
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from daemon.api.app import create_app
from daemon.engine.requests import Deliver, GenerationRequest
from daemon.errors import PromptTooLong

pytestmark = pytest.mark.agents

LIMIT_S = 180


@pytest.fixture(scope="module")
def text() -> Iterator[TextSide]:
    made = text_side()
    yield made
    made.constrainer.close()


class Recorder:
    """The application, with a list of what was asked and how it was answered."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self.state = app.state
        self.answers: list[tuple[str, str, int]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        if scope["type"] == "http":
            await self._app(scope, receive, note)
        else:
            await self._app(scope, receive, send)


class OverflowOnce(ScriptedEngine):
    """Says once, in the middle of a loop of tools, that the prompt is too long."""

    has_overflowed = False

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        prompt = self.text.tokenizer.decode(request.tokens)
        if not self.has_overflowed and "<tool_response>" in prompt.partition("BETA")[2]:
            self.has_overflowed = True
            raise PromptTooLong(len(request.tokens), len(request.tokens) - 1)
        super().submit(request, deliver)

    text: TextSide


def run(
    agent: Agent, arguments: tuple[str, ...], task: str, place: Workplace, *, check: bool = True
) -> str:
    """What the agent prints."""
    environment = {
        "HOME": str(place.home),
        "PATH": os.environ["PATH"],
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        "NO_COLOR": "1",
        **_environment(agent, place),
    }
    done = subprocess.run(
        [str(agent.program), *arguments, task],
        cwd=place.repository,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def _environment(agent: Agent, place: Workplace) -> dict[str, str]:
    marker = place.home / "environment"
    if not marker.exists():
        variables = agent.configure(place)
        marker.write_text("\n".join(f"{name}={value}" for name, value in variables.items()))
    lines = marker.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def repository_in(home: Path) -> Path:
    folder = home / "repository"
    folder.mkdir(parents=True)
    (folder / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-q", "-m", "Begin")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def num_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_two_turns(agent: Agent, text: TextSide, tmp_path: Path) -> None:
    assert agent.program.exists(), f"{agent.name} is not installed; run: make test-agents"
    engine = scripted_engine(text, Coder(text.tokenizer, agent.shell).reply, context_length=CONTEXT)
    recorder = Recorder(create_app(scripted_service(text, engine, RememberedReplies(), None)))
    home = tmp_path / "home"
    try:
        with serving(recorder) as url:
            place = Workplace(home, repository_in(home), url)
            assert FIXED in run(agent, agent.first, FIX, place)
            assert "return a + b" in (place.repository / "calc.py").read_text()
            num_first = len(engine.requests)
            assert TOLD in run(agent, agent.next, ASK, place)
    finally:
        engine.stop()
    statuses = {(method, status) for method, _, status in recorder.answers}
    assert statuses <= {("GET", 200), ("HEAD", 200), ("POST", 200)}, recorder.answers
    assert agent.path in {path for _, path, _ in recorder.answers}
    check_history(agent, text, engine, num_first)


def check_history(agent: Agent, text: TextSide, engine: ScriptedEngine, num_first: int) -> None:
    """The second turn knows the first; in a loop of tools each prompt goes on from the last."""
    prompts = [request.tokens for request in engine.requests]
    last = text.tokenizer.decode(prompts[-1])
    assert last.index("ALPHA") < last.index(FIXED) < last.index("BETA")
    if agent.shell is None:
        return
    steps = [p for p in prompts[:num_first] if "ALPHA" in text.tokenizer.decode(p)]
    extending = [
        new
        for old, new in zip(steps, steps[1:], strict=False)
        if num_common(old, new) == len(old) and len(new) > len(old)
    ]
    assert len(extending) >= 2, [num_common(a, b) for a, b in zip(steps, steps[1:], strict=False)]


@pytest.mark.parametrize("agent", [agent for agent in AGENTS if agent.shell], ids=lambda a: a.name)
def test_an_overflow_is_compacted(agent: Agent, text: TextSide, tmp_path: Path) -> None:
    """qwen-code, claude-code and opencode go on by themselves, codex with the next message."""
    assert agent.program.exists(), f"{agent.name} is not installed; run: make test-agents"
    engine = OverflowOnce(script_of(text, agent), context_length=CONTEXT)
    engine.text = text
    recorder = Recorder(create_app(scripted_service(text, engine, RememberedReplies(), None)))
    home = tmp_path / "home"
    try:
        with serving(recorder) as url:
            place = Workplace(home, repository_in(home), url)
            run(agent, agent.first, FIX, place)
            said = run(agent, agent.next, ASK, place, check=False)
            if agent.name == "codex":
                assert TOLD not in said
                said = run(agent, agent.next, ASK, place)
            assert TOLD in said
    finally:
        engine.stop()
    assert [status for _, _, status in recorder.answers if status != 200] == [400]


def script_of(text: TextSide, agent: Agent) -> Callable[[GenerationRequest], Script]:
    coder = Coder(text.tokenizer, agent.shell)
    return lambda request: Script(text.tokenizer.encode(coder.reply(request)))
