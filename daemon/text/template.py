"""The model file's chat template: messages and tools → frames of text.

Owns jinja and its sandbox, and the frames' boundaries. Knows nothing of token ids.
Immutable after construction; any thread.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct

from daemon.errors import InvalidRequest, ModelFileError
from daemon.text.guard import PLACEHOLDER, Guard, Segment, placeholder
from daemon.text.messages import Message, ToolCall, ToolSpec

FRAME_START = "<|im_start|>"
FRAME_END = "<|im_end|>\n"
FRAME_TOKENS = frozenset({FRAME_START, FRAME_END.rstrip()})

FrameKind = Literal["system", "user", "tool", "assistant", "generation"]

RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
"""Template variables that options must not set."""


class Frame(Struct, frozen=True):
    """One `<|im_start|>…` of a prompt.

    `text` is that of all segments; `messages` are the indices of the messages it shows (several
    for a run of tool results, none for the generation prompt).
    """

    kind: FrameKind
    text: str
    segments: tuple[Segment, ...]
    messages: range


class Refusal(jinja2.TemplateError):
    """A template called raise_exception: the conversation has a shape it does not take."""


class ChatTemplate:
    """Renders with jinja2 as Hugging Face does: same sandbox, filters, functions and spacing.

    Args:
        source: the jinja source, `tokenizer.chat_template` of a GGUF file.
        control_tokens: texts that must never take effect when a client spells them.
        now: the clock behind the template's `strftime_now`.

    Raises:
        ModelFileError: the source does not compile, or does not write ChatML frames.
    """

    def __init__(
        self,
        source: str,
        control_tokens: Iterable[str],
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._guard = Guard(FRAME_TOKENS.union(control_tokens))
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"The chat template does not compile: {error}") from error
        self._probe()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Frame, ...]:
        """The frames of a prompt, the generation prompt last.

        A system message after the first stays in its place, as a frame of its own.

        Args:
            options: variables for the template, such as `enable_thinking`.

        Raises:
            InvalidRequest: the template refuses these messages, or an option is reserved.
        """
        options = options or {}
        if taken := sorted(RESERVED & options.keys()):
            raise InvalidRequest(f"The template option {taken[0]} is reserved.", taken[0])
        texts = _split(self._run(messages, tools, options))
        return self._label(self._restore_system(texts, messages), messages)

    def _run(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], options: Mapping[str, Any]
    ) -> str:
        try:
            return self._template.render(
                self._guard.protect(options),
                messages=[self._variable(i, message) for i, message in enumerate(messages)],
                tools=[self._guard.protect(tool.definition) for tool in tools] or None,
                add_generation_prompt=True,
            )
        except Refusal as refusal:
            raise InvalidRequest(_one_line(refusal), "messages") from refusal
        except SecurityError as error:
            raise ModelFileError(f"The chat template breaks its sandbox: {error}") from error
        except Exception as error:  # a template is a program: it may raise anything
            reason = f"The chat template failed: {_one_line(error)}"
            raise InvalidRequest(reason, "messages") from error

    def _variable(self, index: int, message: Message) -> dict[str, Any]:
        """A message as templates expect it; a late system message leaves only a placeholder.

        The placeholder is an assistant message: the one role that neither merges with its
        neighbours nor moves a template's idea of the last question.
        """
        if _is_late_system(index, message):
            return {"role": "assistant", "content": placeholder(index)}
        variable: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            variable["reasoning_content"] = message.reasoning
        if message.tool_calls:
            variable["tool_calls"] = [_call_variable(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            variable["tool_call_id"] = message.tool_call_id
        return {key: self._guard.protect(value) for key, value in variable.items()}

    def _restore_system(self, texts: Sequence[str], messages: Sequence[Message]) -> list[str]:
        """Write late system messages where their placeholders came out."""
        late = [i for i, message in enumerate(messages) if _is_late_system(i, message)]
        found = [PLACEHOLDER.search(text) for text in texts]
        if [int(place[1]) for place in found if place] != late:
            raise InvalidRequest(
                "This model's chat template cannot show a system message after the first.",
                "messages",
            )
        return [
            self._system_frame(messages[int(place[1])]) if place else text
            for place, text in zip(found, texts, strict=True)
        ]

    def _system_frame(self, message: Message) -> str:
        content = self._guard.protect(message.content.strip())
        return f"{FRAME_START}system\n{content}{FRAME_END}"

    def _label(self, texts: Sequence[str], messages: Sequence[Message]) -> tuple[Frame, ...]:
        """Match frames with messages, in order."""
        frames = []
        start = 0
        for text in texts[:-1]:
            role = _role(text)
            start = _skip_unseen(messages, start, role)
            stop = start + _num_shown(messages, start, role)
            frames.append(self._frame(_kind(role, text, messages[start:stop]), text, start, stop))
            start = stop
        return *frames, self._frame("generation", texts[-1], start, start)

    def _frame(self, kind: FrameKind, rendered: str, start: int, stop: int) -> Frame:
        segments = self._guard.segments(rendered)
        text = "".join(segment.text for segment in segments)
        return Frame(kind, text, segments, range(start, stop))

    def _probe(self) -> None:
        """Render the shortest conversation, so that a useless template fails at the start."""
        try:
            frames = self.render([Message(role="user", content="Hello")])
        except InvalidRequest as error:
            raise ModelFileError(f"The chat template cannot be used: {error}") from error
        if _role(frames[-1].text) != "assistant" or FRAME_END in frames[-1].text:
            raise ModelFileError("The chat template writes no generation prompt in ChatML frames.")


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own tojson escapes for HTML, which models have never seen."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_late_system(index: int, message: Message) -> bool:
    return index > 0 and message.role == "system"


def _call_variable(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _split(rendered: str) -> list[str]:
    """Cut before every frame start; text before the first belongs to the first."""
    before, *rest = rendered.split(FRAME_START)
    if not rest:
        raise ModelFileError("The chat template writes no ChatML frames.")
    return [before + FRAME_START + rest[0], *(FRAME_START + frame for frame in rest[1:])]


def _role(text: str) -> str:
    return text.partition(FRAME_START)[2].partition("\n")[0]


def _skip_unseen(messages: Sequence[Message], start: int, role: str) -> int:
    """Pass over an empty system message, for which a template may write no frame."""
    unseen = start == 0 and bool(messages) and messages[0].role == "system" != role
    return start + unseen


def _num_shown(messages: Sequence[Message], start: int, role: str) -> int:
    """How many messages from `start` on a frame of that role shows."""
    if start == len(messages):
        return 0
    if messages[start].role == "tool" and role in ("user", "tool"):
        others = (i for i in range(start, len(messages)) if messages[i].role != "tool")
        return next(others, len(messages)) - start
    return int(messages[start].role == role)


def _kind(role: str, text: str, shown: Sequence[Message]) -> FrameKind:
    if role == "assistant":
        return "assistant"
    if role == "system":
        return "system"
    if role not in ("user", "tool"):
        raise ModelFileError(f"The chat template writes a frame of the unknown role {role!r}.")
    from_tool = shown[0].role == "tool" if shown else "<tool_response>" in text
    return "tool" if from_tool else "user"
