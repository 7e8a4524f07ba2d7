"""The one form of a conversation behind every dialect. No HTTP, no token ids.

Strings are the client's own; nothing is trimmed here.
"""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(Struct, frozen=True):
    """A call that the assistant made. `arguments` keeps the client's key order."""

    id: str
    name: str
    arguments: Mapping[str, Any]


class Message(Struct, frozen=True, kw_only=True):
    """One message. `tool_call_id` belongs to role tool, the two before it to role assistant.

    `marks` are offsets in `content`, in characters, up to which the client wants the prompt kept;
    one at its end is the end of the message, one of 0 in the first message that of the tools.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    marks: tuple[int, ...] = ()


class ToolSpec(Struct, frozen=True):
    """A tool on offer. `definition` is the whole object as the client sent it, for the template;
    `parameters` its JSON schema (empty: no parameters declared). `strict`: a call's arguments must
    fulfil it."""

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]
    strict: bool = False
