"""Which tokens of a request no earlier one told the server, whatever the dialect.

Owns the definition of "really new": what stands behind the first message that differs from what was
sent or answered before, however the template shows the rest. Knows no HTTP; prompt thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from daemon.text.messages import Message, ToolSpec
from daemon.text.prompt import Prompt, PromptBuilder

NUM_CLOSING = 2
"""The tokens of `<|im_end|>` and the newline behind it."""


class Told(Struct, frozen=True):
    """A conversation that was sent, and its prompt."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    prompt: Prompt


class RecordingBuilder(PromptBuilder):
    """Builds prompts and remembers from what, until they are asked for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.built: dict[tuple[int, ...], Told] = {}

    def build(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """See `PromptBuilder.build`."""
        prompt = super().build(messages, tools, options)
        definitions = tuple(tool.definition for tool in tools)
        self.built[prompt.tokens] = Told(tuple(messages), definitions, prompt)
        return prompt


class NewTokens:
    """Counts, over all that one server was told."""

    def __init__(self) -> None:
        self._told: list[Told] = []

    def count(self, told: Told) -> int:
        """Of a prompt, the tokens behind all that was told and answered before."""
        known = max((_num_known(told, earlier) for earlier in self._told), default=0)
        return len(told.prompt.tokens) - known

    def add(self, told: Told, reply: Message) -> None:
        """This was sent, and so answered."""
        self._told.append(Told((*told.messages, reply), told.tools, told.prompt))


def _num_known(new: Told, old: Told) -> int:
    """Up to the first message that differs, and as far as its own text is the same.

    Behind a whole reply, its closing tokens count as new: the model never sampled them.
    """
    if new.tools != old.tools:
        return _common(new.prompt.tokens, old.prompt.tokens)
    differing = _common([_seen(m) for m in new.messages], [_seen(m) for m in old.messages])
    frames, old_frames = new.prompt.frames, old.prompt.frames
    frame = next((f for f in frames if f.messages.stop > differing), frames[-1])
    old_frame = next((f for f in old_frames if f.messages.stop > differing), None)
    if old_frame is None and differing == len(old.messages):
        return frame.start - NUM_CLOSING
    if old_frame is None or frame.messages.start != old_frame.messages.start:
        return frame.start
    tokens, old_tokens = new.prompt.tokens[frame.start :], old.prompt.tokens[old_frame.start :]
    return frame.start + _common(tokens, old_tokens)


def _seen(message: Message) -> tuple[Any, ...]:
    """What a client sends back of a message: not its thinking, nor the spaces around it."""
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return message.role, message.content.strip(), calls


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    size = min(len(one), len(other))
    return next((i for i in range(size) if one[i] != other[i]), size)
