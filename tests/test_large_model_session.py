"""A coding agent's session with a 27B model's shapes, but for its numbers: prompts, placement,
engine and store are the real ones, and what each request evaluates is counted."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from tape_model import TapeModel

from benchmarks.agent_conversation import Request, session
from benchmarks.agent_session import NewTokens, NoReplies
from benchmarks.make_model import make_model
from benchmarks.model_sizes import SIZES
from daemon.api.openai_chat_messages import ChatMessage, to_messages
from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.checkpoint import Boundary
from daemon.engine.backends.backend import Sampled, SamplingRow
from daemon.engine.engine import StepEngine
from daemon.engine.requests import Event, Finished, GenerationRequest, Priority, Started
from daemon.engine.scheduler import Limits, Scheduler
from daemon.engine.weights.gguf import open_gguf
from daemon.text.messages import Message, ToolSpec
from daemon.text.next_prompt import next_beginning
from daemon.text.prompt import BoundaryReason, PromptBuilder
from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer

STATE_BYTES, PAGE_BYTES = 158_900_000, 2_228_000
CONTEXT = 65_536
CUT = "an old tool result truncated"


class LargeModel(TapeModel):
    """Says what a 27B model's snapshots would take with q8_0 KV; ends each reply at once."""

    snapshot_sizes = STATE_BYTES, PAGE_BYTES
    end_of_reply = 0

    def sample(
        self, logits: list[int], rows: Sequence[SamplingRow], num_tokens: int
    ) -> list[Sampled]:
        return [Sampled(self.end_of_reply, None) for _ in rows]


class Server:
    """What stands between a client and the engine, without HTTP."""

    def __init__(self, model_file: Path, folder: Path, num_inner_slots: int) -> None:
        metadata = open_gguf(model_file).metadata
        tokenizer = Tokenizer.from_metadata(metadata)
        source = str(metadata["tokenizer.chat_template"])
        template = ChatTemplate(source, tokenizer.control_tokens)
        self.prompts = PromptBuilder(tokenizer, template, NoReplies())
        self.cache = CheckpointCache.open(
            folder,
            CacheLimits(budget_bytes=20 << 30, memory_bytes=8 << 30),
            fingerprint=b"a large model's.",
            model_name="27b",
        )
        num_pages = 4 * CONTEXT // 64 + 1
        limits = Limits(4, 64, 2048, num_pages, 4, max_residents=8, num_inner_slots=num_inner_slots)
        model = LargeModel(limits.num_slots, limits.num_pages)
        model.end_of_reply = min(tokenizer.stop_tokens)
        self.stop_tokens = frozenset([model.end_of_reply])
        self.engine = StepEngine(
            model,  # type: ignore[arg-type]
            Scheduler(limits),
            self.cache,
            context_length=CONTEXT,
            num_tokens=248_320,
            strict=False,
            canonical=True,
            wake=lambda: None,
        )

    def ask(self, request: Request) -> int:
        """Tokens reused; what may come next has begun to be evaluated afterwards."""
        messages = to_messages(msgspec.convert(list(request.messages), list[ChatMessage]))
        tools = [ToolSpec(tool["function"]["name"], {}, tool) for tool in request.tools]
        prompt = self.prompts.build(messages, tools)
        events = self._submit(request.name, prompt.tokens, prompt.boundaries, "client")
        while not (events and isinstance(events[-1], Finished)):
            self.engine.step()
        reply = Message(role="assistant", content="")
        ahead = next_beginning(self.prompts, messages, tools, {}, reply)
        self._submit(f"{request.name}, next", ahead.tokens, ahead.boundaries, "next")
        for _ in range(3):
            self.engine.step()
        return next(event.num_cached_tokens for event in events if isinstance(event, Started))

    def wait_until_idle(self) -> None:
        while self.engine.step() or self.engine.sequences:
            pass

    def _submit(
        self,
        name: str,
        tokens: tuple[int, ...],
        boundaries: Sequence[tuple[int, BoundaryReason]],
        priority: Priority,
    ) -> list[Event]:
        events: list[Event] = []
        request = GenerationRequest(
            id=name,
            tokens=tokens,
            boundaries=tuple(Boundary(*boundary) for boundary in boundaries),
            max_tokens=8 if priority == "client" else 0,
            stop_tokens=self.stop_tokens,
            priority=priority,
        )
        self.engine.add(request, events.append)
        return events


def tokens_beyond_the_new(model_file: Path, folder: Path, slots: int) -> Iterator[tuple[str, int]]:
    server, new = Server(model_file, folder, slots), NewTokens(model_file)
    for request in session():
        if request.after_restart:
            break
        if request.is_turn:
            server.wait_until_idle()
        num_tokens, num_new = new.count(request)
        yield request.name, num_tokens - server.ask(request) - num_new
    server.engine.stop()
    server.cache.close()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but the weights."""
    path = tmp_path_factory.mktemp("model") / "27b.gguf"
    make_model(path, SIZES["27b"], "q4_k_m", has_data=False)
    return path


def test_every_request_evaluates_what_is_new_and_a_page(model_file: Path, tmp_path: Path) -> None:
    """With as many states inside messages as a card of 80 GB has room for at twice the context."""
    beyond = dict(tokens_beyond_the_new(model_file, tmp_path, slots=148))
    assert len(beyond) == 13
    assert max(beyond.values()) <= 64, beyond


def test_on_a_full_card_only_an_unforeseen_cut_costs_more(model_file: Path, tmp_path: Path) -> None:
    beyond = dict(tokens_beyond_the_new(model_file, tmp_path, slots=0))
    assert 64 < beyond.pop(CUT) <= 1024
    assert max(beyond.values()) <= 64, beyond
