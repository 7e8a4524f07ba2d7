"""The real application over an engine that follows a script, with tiny-coder's own text side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes import RememberedReplies, Script, ScriptedEngine
from msgspec import Struct

from daemon.api.service import Limits, Service
from daemon.engine.requests import GenerationRequest, SamplingParams
from daemon.engine.weights.gguf import open_gguf
from daemon.metrics import Metrics
from daemon.text.constrainer import Constrainer
from daemon.text.messages import ToolCall
from daemon.text.prompt import PromptBuilder
from daemon.text.prompt_history import FrameShape, PromptHistory
from daemon.text.template import FRAME_END, FRAME_START, ChatTemplate
from daemon.text.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "daemon" / "embedded" / "tiny-coder-Q4_K_M.gguf"


class TextSide(Struct, frozen=True):
    """What a service needs of a model besides the engine; made once, used by many."""

    tokenizer: Tokenizer
    template: ChatTemplate
    constrainer: Constrainer


def text_side() -> TextSide:
    """tiny-coder's; close the constrainer when done."""
    metadata = dict(open_gguf(MODEL).metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    template = ChatTemplate(str(metadata["tokenizer.chat_template"]), tokenizer.control_tokens)
    return TextSide(tokenizer, template, Constrainer(tokenizer))


def scripted_engine(
    text: TextSide, reply: Callable[[GenerationRequest], Script | str], **options: int
) -> ScriptedEngine:
    """An engine that says what `reply` makes of each request."""

    def script(request: GenerationRequest) -> Script:
        chosen = reply(request)
        if isinstance(chosen, Script):
            return chosen
        return Script(text.tokenizer.encode(chosen), num_cached=3, num_kept=5)

    return ScriptedEngine(script, **options)


def scripted_service(
    text: TextSide, engine: ScriptedEngine, replies: RememberedReplies, limits: Limits | None
) -> Service:
    """A service around it, as assemble would make it."""
    tokenizer = text.tokenizer
    shape = FrameShape(tokenizer.control_tokens[FRAME_START], tuple(tokenizer.encode(FRAME_END)))
    return Service(
        engine=engine,
        engine_state=lambda: "ok",
        tokenizer=tokenizer,
        prompts=PromptBuilder(tokenizer, text.template, replies),
        constrainer=text.constrainer,
        remember=replies.remember,
        cache_stats=lambda: {"checkpoints": 0},
        metrics=Metrics(),
        history=PromptHistory(shape),
        sampling=SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        limits=limits or Limits(),
        aliases=("qwen3.5-local",),
    )


def spell_reply(
    content: str, calls: list[ToolCall], *, reasoning: str | None, thinking_open: bool
) -> str:
    """A reply as the model would write it after a prompt that leaves thinking open, or not."""
    parts = [f"{reasoning or ''}\n</think>\n\n"] if thinking_open else []
    blocks = [content] if content else []
    blocks += [_spell_call(call) for call in calls]
    return "".join(parts) + "\n\n".join(blocks)


def _spell_call(call: ToolCall) -> str:
    lines = ["<tool_call>", f"<function={call.name}>"]
    for key, value in call.arguments.items():
        lines += [f"<parameter={key}>", _spell_value(value), "</parameter>"]
    return "\n".join((*lines, "</function>", "</tool_call>"))


def _spell_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
