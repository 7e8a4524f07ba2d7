"""What a message says, however it is spelled: keys that a client's re-serialising does not change.

Owns what counts as the same: the content without the spaces around it, calls by name and typed
arguments in any order. Knows nothing of tokens. Pure; any thread.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import xxhash

from daemon.text.messages import Message

Form = Literal["full", "bare"]
"""Whether a template writes a reply with its thinking, or without."""


def reply_key(message: Message, form: Form, before: str) -> str:
    """The key of an assistant message in one form.

    A client that drops the thinking leaves only what was said before to tell replies apart.

    Args:
        before: the digest of the messages before it, see `digests`.
    """
    reasoning = (message.reasoning or "").strip()
    if form == "bare":
        context = ""
    else:
        context = f"thinking {reasoning}" if reasoning else f"after {before}"
    return f"{form}\n{context}\n{said(message)}"


def digests(messages: Sequence[Message]) -> Iterator[str]:
    """Of each beginning of a conversation what it says, the empty one first; thinking left out."""
    digest = xxhash.xxh3_128()
    yield digest.hexdigest()
    for message in messages:
        digest.update(f"{message.role}\n{said(message)}\0".encode("utf-8", "surrogatepass"))
        yield digest.hexdigest()


def said(message: Message) -> str:
    """A message's content and calls in canonical form."""
    calls = [
        [call.name, {key: _canonical_argument(value) for key, value in call.arguments.items()}]
        for call in message.tool_calls
    ]
    return json.dumps([message.content.strip(), calls], sort_keys=True)


def _canonical_argument(value: Any) -> Any:
    """In a call's own format a scalar is its text: nothing tells 5 from "5", or true from True."""
    value = _canonical(value)
    return value if isinstance(value, str | dict | list) else json.dumps(value)


def _canonical(value: Any) -> Any:
    """JSON knows one kind of number, and no order of keys."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value
