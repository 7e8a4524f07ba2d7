"""Messages as Anthropic clients send them, blocks and all, and their translation into Messages.

Owns the Structs of a block and what is refused in one. Pure; runs on the prompt thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from daemon.api.sealed_reasoning import unseal
from daemon.errors import InvalidRequest
from daemon.text.messages import Message, ToolCall, ToolSpec

JOINT = "\n\n"
"""Between two texts of a message, which the client wrote as separate blocks."""

REMINDER = "<system-reminder>"
"""Begins a text that an agent, not its user, puts behind a tool's result. Shown as a message of the
user it would end the loop of tools, and templates drop the thinking before a new question."""

TEXT_BLOCKS = ("text",)
RESULT_BLOCKS = ("text", "tool_reference")
USER_BLOCKS = ("text", "tool_result")
ASSISTANT_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use")


class CacheControl(Struct):
    """Marks the end of a block as the end of a prefix to keep; how long is the store's business."""

    type: Literal["ephemeral"] = "ephemeral"
    ttl: str | None = None


class Block(Struct):
    """A block of a message; which fields it needs depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    tool_name: str = ""
    content: "str | list[Block] | None" = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class AnthropicMessage(Struct):
    """One message. System messages may stand anywhere."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class _Text:
    """Texts of blocks put together, with the marks between them."""

    def __init__(self) -> None:
        self.content = ""
        self.marks: list[int] = []
        self.is_empty = True

    def add(self, text: str, *, marked: bool, joint: str = JOINT) -> None:
        self.content += joint + text if self.content and text else text
        self.is_empty = False
        if marked:
            self.marks.append(len(self.content))

    def user_message(self) -> list[Message]:
        """The message that it is; none without any text."""
        if self.is_empty:
            return []
        return [Message(role="user", content=self.content, marks=tuple(self.marks))]


def to_messages(
    system: str | list[Block] | None,
    messages: Sequence[AnthropicMessage],
    deferred: Mapping[str, ToolSpec],
    *,
    marks_tools: bool,
) -> tuple[Message, ...]:
    """Translate system blocks and messages.

    Args:
        deferred: tools that the prompt does not list until a tool's result refers to them.
        marks_tools: the client marked the end of the tools.

    Raises:
        InvalidRequest: a block that cannot be read, or lacks what its type needs.
    """
    translated = [*_system(system, marks_tools)]
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        blocks = _blocks(message.content)
        match message.role:
            case "system":
                translated.append(_system_message(blocks, f"{path}.content"))
            case "assistant":
                translated.append(_assistant(blocks, f"{path}.content"))
            case "user":
                translated += _user(blocks, f"{path}.content", deferred)
    return tuple(translated)


def _blocks(content: str | list[Block]) -> list[Block]:
    return [Block("text", text=content)] if isinstance(content, str) else content


def _system(system: str | list[Block] | None, marks_tools: bool) -> Iterator[Message]:
    if blocks := _blocks(system or []):
        message = _system_message(blocks, "system")
        marks = (0, *message.marks) if marks_tools else message.marks
        yield msgspec.structs.replace(message, marks=marks)


def _system_message(blocks: Sequence[Block], path: str) -> Message:
    text = _Text()
    for place, block in _checked(blocks, path, TEXT_BLOCKS):
        text.add(_needed(block.text, f"{place}.text"), marked=block.cache_control is not None)
    return Message(role="system", content=text.content, marks=tuple(text.marks))


def _user(
    blocks: Sequence[Block], path: str, deferred: Mapping[str, ToolSpec]
) -> Iterator[Message]:
    """Tool results are messages of their own, in the order in which they stand."""
    shown: list[Message] = []
    text = _Text()
    for place, block in _checked(blocks, path, USER_BLOCKS):
        if block.type == "tool_result":
            shown += text.user_message()
            text = _Text()
            shown.append(_tool_result(block, place, deferred))
            continue
        words = _needed(block.text, f"{place}.text")
        marked = block.cache_control is not None
        if text.is_empty and shown and words.startswith(REMINDER):
            shown[-1] = _reminded(shown[-1], words, marked)
        else:
            text.add(words, marked=marked)
    yield from shown
    yield from text.user_message() if blocks else [Message(role="user")]


def _reminded(result: Message, words: str, marked: bool) -> Message:
    """A tool's result with an agent's words behind it."""
    content = result.content + JOINT + words
    marks = (*result.marks, len(content)) if marked else result.marks
    return msgspec.structs.replace(result, content=content, marks=marks)


def _tool_result(block: Block, path: str, deferred: Mapping[str, ToolSpec]) -> Message:
    if not block.tool_use_id:
        raise _refused(f"{path}.tool_use_id", "a tool result must name the call it answers")
    text = _Text()
    parts = _blocks(block.content or "")
    for place, part in _checked(parts, f"{path}.content", RESULT_BLOCKS):
        marked = part.cache_control is not None
        if part.type == "tool_reference":
            text.add(_definition(part, place, deferred), marked=marked)
        else:
            text.add(_needed(part.text, f"{place}.text"), marked=marked)
    content = text.content
    marks = text.marks
    if block.is_error and "error" not in content[:40].casefold():
        content = f"Error: {content}"
        marks = [mark + len("Error: ") for mark in marks]
    if block.cache_control is not None:
        marks = [*marks, len(content)]
    return Message(role="tool", content=content, tool_call_id=block.tool_use_id, marks=tuple(marks))


def _definition(block: Block, path: str, deferred: Mapping[str, ToolSpec]) -> str:
    """A tool that a search has found, as the system prompt would have shown it."""
    if block.tool_name not in deferred:
        raise _refused(f"{path}.tool_name", f"there is no deferred tool {block.tool_name!r}")
    return msgspec.json.encode(deferred[block.tool_name].definition).decode()


def _assistant(blocks: Sequence[Block], path: str) -> Message:
    text = _Text()
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for place, block in _checked(blocks, path, ASSISTANT_BLOCKS):
        match block.type:
            case "text":
                text.add(_needed(block.text, f"{place}.text"), marked=False, joint="")
            case "thinking":
                sealed = unseal(block.signature)
                reasoning.append(sealed if sealed is not None else block.thinking or "")
            case "redacted_thinking":
                reasoning.append(unseal(block.data) or "")
            case "tool_use":
                calls.append(_call(block, place))
    marked = any(block.cache_control is not None for block in blocks)
    return Message(
        role="assistant",
        content=text.content,
        reasoning="".join(reasoning) if reasoning else None,
        tool_calls=tuple(calls),
        marks=(len(text.content),) if marked else (),
    )


def _call(block: Block, path: str) -> ToolCall:
    if not block.name:
        raise _refused(f"{path}.name", "a tool use must name its tool")
    return ToolCall(block.id, block.name, block.input or {})


def _checked(
    blocks: Sequence[Block], path: str, allowed: tuple[str, ...]
) -> Iterator[tuple[str, Block]]:
    for index, block in enumerate(blocks):
        place = f"{path}[{index}]"
        if block.type in ("image", "document"):
            raise _refused(f"{place}.type", f"this model reads text only, not {block.type!r}")
        if block.type not in allowed:
            raise _refused(f"{place}.type", f"{block.type!r} is none of {', '.join(allowed)}")
        yield place, block


def _needed(text: str | None, param: str) -> str:
    if text is None:
        raise _refused(param, "the block has none")
    return text


def _refused(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {why}.", param)
