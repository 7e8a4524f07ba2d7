"""Chat messages as OpenAI clients send them, and their translation into Messages.

Owns the Structs of a message and what is refused in one. Pure; runs on the prompt thread.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from daemon.errors import InvalidRequest
from daemon.text.messages import Message, Role, ToolCall

UNPARSED = "arguments"
"""The one argument that stands for arguments which are no JSON object."""


class ContentPart(Struct):
    """A part of a content list; only those of type text (and refusal) can be read.

    Its end may be marked as a place to keep, in OpenAI's words or in Anthropic's.
    """

    type: str
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    @property
    def is_marked(self) -> bool:
        """Whether the prompt up to its end is to be kept."""
        return self.prompt_cache_breakpoint is not None or self.cache_control is not None


Content = str | list[ContentPart] | None


class FunctionCall(Struct):
    """A call's function. `arguments` is JSON in a string; some clients send the object itself."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CallOfMessage(Struct):
    """A tool call that the assistant made."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class ChatMessage(Struct):
    """One message. Reasoning comes back under either name; `name` is accepted without effect."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallOfMessage] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    function_call: Any = None


def to_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Translate all messages.

    Raises:
        InvalidRequest: a part that is no text, content or an id that is missing, calls in a
            message that cannot have them.
    """
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: ChatMessage, path: str) -> Message:
    if message.function_call:
        raise _refused(f"{path}.function_call", "it is deprecated; use tool_calls")
    if message.tool_calls and message.role != "assistant":
        raise _refused(f"{path}.tool_calls", f"a {message.role} message cannot have any")
    if message.role == "tool" and not message.tool_call_id:
        raise _refused(f"{path}.tool_call_id", "a tool message must name the call it answers")
    if message.content is None and message.role not in ("assistant", "tool"):
        raise _refused(f"{path}.content", f"a {message.role} message must have some")
    is_assistant = message.role == "assistant"
    content, marks = _text(message.content, f"{path}.content")
    return Message(
        role=_role(message.role),
        content=content or message.refusal or "",
        reasoning=_reasoning(message) if is_assistant else None,
        tool_calls=tuple(map(_call, message.tool_calls or ())),
        tool_call_id=message.tool_call_id,
        marks=marks,
    )


def _role(role: str) -> Role:
    match role:
        case "system" | "developer":
            return "system"
        case "user":
            return "user"
        case "assistant":
            return "assistant"
        case _:
            return "tool"


def _reasoning(message: ChatMessage) -> str | None:
    given = message.reasoning_content
    return given if given is not None else message.reasoning


def _text(content: Content, path: str) -> tuple[str, tuple[int, ...]]:
    """The parts' text, and the marks between them."""
    if not isinstance(content, list):
        return content or "", ()
    text, marks = "", []
    for index, part in enumerate(content):
        text += _part(part, f"{path}[{index}]")
        if part.is_marked:
            marks.append(len(text))
    return text, tuple(marks)


def _part(part: ContentPart, path: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if part.type not in ("text", "refusal"):
        raise _refused(f"{path}.type", f"this model reads text only, not {part.type!r}")
    if text is None:
        raise _refused(f"{path}.{part.type}", "the part has none")
    return text


def _call(call: CallOfMessage) -> ToolCall:
    return ToolCall(call.id, call.function.name, arguments_of(call.function.arguments))


def arguments_of(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """A call's arguments as a mapping, which the template needs.

    A string that is no JSON object is a call that a model once got wrong. To refuse it would end
    the session for good, so it is shown as it was, under a name of its own.
    """
    if not isinstance(given, str):
        return given or {}
    if not given.strip():
        return {}
    try:
        arguments = msgspec.json.decode(given)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {UNPARSED: given}
    return arguments if isinstance(arguments, dict) else {UNPARSED: given}


def _refused(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {why}.", param)
