"""What a request asks to be answered, whatever its dialect: a conversation, or a prompt as it is.

Owns the types only. Frozen; any thread.
"""

from typing import Any

from msgspec import Struct

from daemon.text.messages import Message, ToolSpec
from daemon.text.prompt import Prompt


class Conversation(Struct, frozen=True, kw_only=True):
    """What is to be answered. `template_options` go to the chat template.

    `deferred_tools` may be called, but the prompt does not list them.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    deferred_tools: tuple[ToolSpec, ...] = ()
    template_options: dict[str, Any] = {}
    session: str = ""


class RawPrompt(Struct, frozen=True):
    """A prompt without messages, built by its dialect."""

    prompt: Prompt
    session: str = ""
