"""Which session a request belongs to: by the client's own hint, or by how it begins.

Owns the order of the hints. A session groups requests for people and statistics; it is never part
of a checkpoint's key. Pure.
"""

import re
from collections.abc import Mapping, Sequence

import xxhash

from daemon.text.messages import Message

HEADERS = (
    "x-session-id",
    "x-session-affinity",
    "x-affinity",
    "thread-id",
    "x-claude-code-session-id",
)
"""Headers by which coding agents name their session, the most telling first."""

MAX_LENGTH = 128
MAX_TITLE = 80
_BLOCK = re.compile(r"\s*<([\w-]+)[^>]*>.*?</\1>\s*", re.DOTALL)


def session_of(headers: Mapping[str, str], hint: str | None, messages: Sequence[Message]) -> str:
    """The session's name: `hint` from the body, else a header's, else one from the first messages.

    Without a hint, requests with the same system prompt and first question are one session.
    """
    given = hint or next((headers[name] for name in HEADERS if headers.get(name)), None)
    return given[:MAX_LENGTH] if given else _derived(messages)


def title_of(messages: Sequence[Message]) -> str:
    """What a session is about, for people: the first line that the user wrote.

    Agents put blocks of their own, in tags, before it or into messages of their own; these are
    passed over, unless there is nothing else.
    """
    said = [message.content for message in messages if message.role == "user"]
    lines = [line for text in (*map(_without_blocks, said), *said) for line in text.split("\n")]
    first = next((line.strip() for line in lines if line.strip()), "")
    return first if len(first) <= MAX_TITLE else first[: MAX_TITLE - 1] + "…"


def _without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def _derived(messages: Sequence[Message]) -> str:
    digest = xxhash.xxh3_64()
    for role in ("system", "user"):
        first = next((m.content for m in messages if m.role == role), "")
        digest.update(first.encode("utf-8", "surrogatepass") + b"\0")
    return f"auto-{digest.hexdigest()[:12]}"
