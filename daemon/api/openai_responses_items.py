"""A conversation as items of /v1/responses, and its translation into Messages.

Owns the Structs of an input item and what is refused in one. Pure; runs on the prompt thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from daemon.api.openai_chat_messages import arguments_of
from daemon.api.openai_responses_tools import ToolNames
from daemon.api.request_body import invalid
from daemon.api.sealed_reasoning import unseal
from daemon.errors import InvalidRequest
from daemon.text.messages import Message, ToolCall

CUSTOM_INPUT = "input"
"""The one argument under which the model is shown a custom tool's free text."""

TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
MEDIA_PARTS = ("input_image", "input_file", "input_audio", "image_url")

PROVIDERS_ITEMS = frozenset(
    {
        "code_interpreter_call",
        "compaction",
        "computer_call",
        "computer_call_output",
        "file_search_call",
        "image_generation_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "mcp_list_tools",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    }
)
"""Traces of tools that a provider ran. They mean nothing here: passed over, and named."""


class Part(Struct):
    """A part of a message, of a call's output or of reasoning."""

    type: str
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


Content = str | list[Part] | None


class Item(Struct):
    """An item; which fields it needs depends on its type. Without one it is a message."""

    type: str = "message"
    role: str = ""
    content: Content = None
    id: str | None = None
    call_id: str = ""
    name: str = ""
    namespace: str | None = None
    arguments: str | dict[str, Any] | None = None
    input: str | None = None
    output: Content = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class Translation(Struct, frozen=True):
    """The messages, and what was passed over, to be told to the client."""

    messages: tuple[Message, ...]
    passed_over: tuple[str, ...]


class _Assistant:
    """One assistant message, from the items that a reply was split into."""

    def __init__(self) -> None:
        self.reasoning: list[str] = []
        self.content = ""
        self.calls: list[ToolCall] = []

    def has_answered(self) -> bool:
        return bool(self.content or self.calls)

    def message(self) -> Message:
        return Message(
            role="assistant",
            content=self.content,
            reasoning="".join(self.reasoning) if self.reasoning else None,
            tool_calls=tuple(self.calls),
        )


def to_messages(given: str | Sequence[Item], names: ToolNames) -> Translation:
    """Translate the value of `input`.

    Reasoning, text and calls in a row are one assistant message, until reasoning begins another.

    Raises:
        InvalidRequest: an item that cannot be read, or lacks what its type needs.
    """
    if isinstance(given, str):
        return Translation((Message(role="user", content=given),), ())
    messages: list[Message] = []
    passed_over: list[str] = []
    reply: _Assistant | None = None
    for index, item in enumerate(given):
        path = f"input[{index}]"
        if item.type in PROVIDERS_ITEMS:
            passed_over.append(f"{path} ({item.type})")
        elif _is_of_a_reply(item):
            if reply is not None and item.type == "reasoning" and reply.has_answered():
                messages.append(reply.message())
                reply = None
            reply = reply or _Assistant()
            _add(reply, item, path, names)
        else:
            messages += [reply.message()] if reply is not None else []
            reply = None
            messages.append(_message(item, path))
    messages += [reply.message()] if reply is not None else []
    return Translation(tuple(messages), tuple(passed_over))


def _is_of_a_reply(item: Item) -> bool:
    if item.type == "message":
        return item.role == "assistant"
    return item.type in ("reasoning", "function_call", "custom_tool_call")


def _add(reply: _Assistant, item: Item, path: str, names: ToolNames) -> None:
    match item.type:
        case "reasoning":
            reply.reasoning.append(_reasoning(item))
        case "message":
            reply.content += _text(item.content, f"{path}.content")[0]
        case "function_call":
            name = names.shown(item.name, item.namespace)
            reply.calls.append(ToolCall(_call_id(item, path), name, arguments_of(item.arguments)))
        case "custom_tool_call":
            name = names.shown(item.name, item.namespace)
            given = {CUSTOM_INPUT: item.input or ""}
            reply.calls.append(ToolCall(_call_id(item, path), name, given))


def _message(item: Item, path: str) -> Message:
    match item.type:
        case "message":
            content, marks = _text(item.content, f"{path}.content")
            match item.role:
                case "user":
                    return Message(role="user", content=content, marks=marks)
                case "system" | "developer":
                    return Message(role="system", content=content, marks=marks)
            raise _refused(f"{path}.role", f"{item.role!r} is no role of a message")
        case "function_call_output" | "custom_tool_call_output":
            content, marks = _text(item.output, f"{path}.output")
            call_id = _call_id(item, path)
            return Message(role="tool", content=content, tool_call_id=call_id, marks=marks)
        case "item_reference":
            raise _refused(path, "references are not supported; send the item itself")
    raise _refused(f"{path}.type", f"{item.type!r} is no item that this server can read")


def _reasoning(item: Item) -> str:
    """The sealed text, which is exact, else the visible one."""
    sealed = unseal(item.encrypted_content)
    if sealed is not None:
        return sealed
    parts = item.content if isinstance(item.content, list) and item.content else item.summary or ()
    return "".join(part.text or "" for part in parts)


def _text(content: Content, path: str) -> tuple[str, tuple[int, ...]]:
    """The parts' text, and the marks between them."""
    if not isinstance(content, list):
        return content or "", ()
    text, marks = "", []
    for index, part in enumerate(content):
        text += _part(part, f"{path}[{index}]")
        if part.prompt_cache_breakpoint is not None:
            marks.append(len(text))
    return text, tuple(marks)


def _part(part: Part, path: str) -> str:
    if part.type in MEDIA_PARTS:
        raise _refused(f"{path}.type", f"this model reads text only, not {part.type!r}")
    if part.type not in TEXT_PARTS:
        raise _refused(f"{path}.type", f"{part.type!r} is none of {', '.join(TEXT_PARTS)}")
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise _refused(f"{path}.text", "the part has none")
    return text


def _call_id(item: Item, path: str) -> str:
    if not item.call_id:
        raise _refused(f"{path}.call_id", "a call and its output must have one")
    if item.type in ("function_call", "custom_tool_call") and not item.name:
        raise _refused(f"{path}.name", "a call must name its tool")
    return item.call_id


def _refused(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {why}.", param)


def read_items(given: str | Sequence[Mapping[str, Any]]) -> str | list[Item]:
    """The Structs of `input`.

    Raises:
        InvalidRequest: an item whose fields have wrong types; names the place.
    """
    if isinstance(given, str):
        return given
    return [*_converted(given)]


def _converted(given: Sequence[Mapping[str, Any]]) -> Iterator[Item]:
    for index, item in enumerate(given):
        try:
            yield msgspec.convert(item, Item)
        except msgspec.ValidationError as error:
            raise invalid(error, f"input[{index}]") from error
