"""A whole reply as the message that its client will send back.

Owns nothing but the joining of a parser's deltas. Pure; any thread.
"""

from collections.abc import Sequence

import msgspec

from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.reply_parser import ContentDelta, ReasoningDelta, ReplyParser, ToolCallDelta


def read_reply(text: str, tools: Sequence[ToolSpec], *, thinking_open: bool) -> Message:
    """What a reply's text says. Calls have no ids; reasoning that is empty is None.

    Args:
        thinking_open: its generation prompt ended inside `<think>`.
    """
    parser = ReplyParser(tools, thinking_open=thinking_open, new_call_id=str)
    deltas = [*parser.feed(text), *parser.finish()]
    return Message(
        role="assistant",
        content="".join(d.text for d in deltas if isinstance(d, ContentDelta)),
        reasoning="".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) or None,
        tool_calls=tuple(_call(d) for d in deltas if isinstance(d, ToolCallDelta)),
    )


def _call(delta: ToolCallDelta) -> ToolCall:
    return ToolCall(delta.id, delta.name, msgspec.json.decode(delta.arguments))
