"""What the next request of a conversation will begin with, once a reply has ended.

Owns the guess of what comes next: results of the calls, or a question of the user, before which
templates drop the thinking. Knows no engine. Pure; any thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from daemon.text.messages import Message, ToolSpec
from daemon.text.prompt import BoundaryReason, PromptBuilder


class Beginning(Struct, frozen=True):
    """The tokens that are known of a prompt to come, and the boundaries up to their end."""

    tokens: tuple[int, ...]
    boundaries: tuple[tuple[int, BoundaryReason], ...]


def next_beginning(
    builder: PromptBuilder,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec],
    options: Mapping[str, Any],
    reply: Message,
) -> Beginning:
    """The next prompt up to the frame that its client will add.

    Raises:
        InvalidRequest: the template takes no such conversation.
    """
    prompt = builder.build((*messages, reply, *_to_come(reply)), tools, options)
    end = prompt.frames[-2].start
    reached = tuple(boundary for boundary in prompt.boundaries if boundary[0] <= end)
    return Beginning(prompt.tokens[:end], reached)


def _to_come(reply: Message) -> Sequence[Message]:
    if not reply.tool_calls:
        return [Message(role="user", content="?")]
    return [Message(role="tool", content="?", tool_call_id=call.id) for call in reply.tool_calls]
