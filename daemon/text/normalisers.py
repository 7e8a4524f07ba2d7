"""Rules that take out of a conversation what clients change without meaning anything by it.

Owns the rules, each a small function with a name; the project's README lists them. The safe ones
change order and noise, nothing that a model would read otherwise; the others are on only where
asked for. Knows nothing of templates or tokens. Any thread.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from daemon.errors import ConfigError
from daemon.text.messages import Message, ToolSpec
from daemon.text.tool_order import ToolOrder
from daemon.text.tool_spellings import ToolSpellings

BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
SCHEMA_ORDER = ("type", "title", "description", "enum", "const", "default", "properties", "items",
                "required", "additionalProperties")  # fmt: skip
"""The first keys of a schema; the others follow by name."""
SCHEMA_MAPS = frozenset({"properties", "$defs", "definitions", "patternProperties",
                         "dependentSchemas"})  # fmt: skip
"""Keywords under which keys are names of the client's own."""
VALUES = frozenset({"default", "const", "enum", "examples"})
"""Keywords under which stands data, whose order is left alone."""
CLOCK = re.compile(
    r"(?P<day>\b\d{4}-\d\d-\d\d)[T ]\d\d:\d\d(:\d\d(\.\d+)?)?( ?(Z|UTC|GMT|[+-]\d\d:?\d\d)\b)?"
)
ENVIRONMENT = re.compile(
    r"^[ \t]*(?:"
    r"(?:today's date|today is|(?:the )?current (?:date|time)|(?:primary )?working directory|cwd)\b"
    r"(?: is)?[:=]? [^\n]*"
    r"|<(?P<tag>cwd|current_date|current_time)>[^\n]*</(?P=tag)>"
    r"|git: [^\n]*"
    r")\n?",
    re.IGNORECASE | re.MULTILINE,
)


class Conversation(Struct, frozen=True):
    """What rules look at, and what they make of it."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]


Rule = Callable[[Conversation], Conversation]


class Normaliser:
    """Rules, in the order in which they are applied. Safe on any thread."""

    def __init__(self, names: Sequence[str]) -> None:
        self._rules = [(name, RULES[name]()) for name in RULES if name in names]

    def apply(self, given: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """The conversation without noise, and the names of the rules that changed it."""
        fired = []
        for name, rule in self._rules:
            changed = rule(given)
            if _differs(changed, given):
                fired.append(name)
            given = changed
        return given, tuple(fired)


def read_names(text: str) -> tuple[str, ...]:
    """Rules by a list with commas; `safe`, `all` and `none` stand for several.

    Raises:
        ConfigError: a name that no rule has.
    """
    sets = {"safe": SAFE, "all": tuple(RULES), "none": ()}
    chosen: set[str] = set()
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in sets and name not in RULES:
            known = ", ".join((*sets, *RULES))
            raise ConfigError(f"--normalise: {name!r} is no rule; there are {known}")
        chosen.update(sets.get(name, (name,)))
    return tuple(name for name in RULES if name in chosen)


def without_billing_header(given: Conversation) -> Conversation:
    """Drops a line addressed to the provider, whose hash changes from one agent to the next."""
    return _with_system(given, lambda text: BILLING.sub("", text, count=1), at_start=BILLING)


def with_schemas_in_order(given: Conversation) -> Conversation:
    """Writes the keys of tools' schemas in one order, whatever came first before a restart."""
    return Conversation(given.messages, tuple(map(_in_order, given.tools)))


def without_clock(given: Conversation) -> Conversation:
    """Leaves of a time in the system prompt only the day."""
    return _with_system(given, lambda text: CLOCK.sub(r"\g<day>", text))


def with_environment_last(given: Conversation) -> Conversation:
    """Moves date, working directory and git status from the system prompt to before the newest
    question, as a system message: when they change, what stands before it is the same."""
    first, *rest = given.messages
    if first.role != "system" or not any(message.role == "user" for message in rest):
        return given
    lines = [found[0].strip() for found in ENVIRONMENT.finditer(first.content)]
    if not lines:
        return given
    kept = _cut(first, ENVIRONMENT)
    question = max(i for i, message in enumerate(rest) if message.role == "user")
    moved = Message(role="system", content="\n".join(lines))
    return Conversation((kept, *rest[:question], moved, *rest[question:]), given.tools)


def as_spelled_first() -> Rule:
    """Shows a tool that comes again with its keys in another order as it was first."""
    spellings = ToolSpellings()
    return lambda given: Conversation(given.messages, tuple(map(spellings.first, given.tools)))


def with_tools_arranged() -> Rule:
    """Puts tools into the order that shares most with what came before."""
    order = ToolOrder()
    return lambda given: Conversation(given.messages, order.arrange(given.tools))


RULES: Mapping[str, Callable[[], Rule]] = {
    "billing-header": lambda: without_billing_header,
    "tool-spelling": as_spelled_first,
    "schema-order": lambda: with_schemas_in_order,
    "tool-order": with_tools_arranged,
    "clock": lambda: without_clock,
    "environment-last": lambda: with_environment_last,
}
"""What makes each rule; two of them remember what they have seen."""

SAFE = ("billing-header", "tool-spelling")


def _with_system(
    given: Conversation, change: Callable[[str], str], at_start: re.Pattern[str] | None = None
) -> Conversation:
    first, *rest = given.messages
    if first.role != "system" or (at_start and not at_start.match(first.content)):
        return given
    content = change(first.content)
    if content == first.content:
        return given
    return Conversation((_with_content(first, content), *rest), given.tools)


def _cut(message: Message, pattern: re.Pattern[str]) -> Message:
    return _with_content(message, pattern.sub("", message.content))


def _with_content(message: Message, content: str) -> Message:
    """Marks keep their distance from the end, where more of a text stays as it is; 0 stays 0."""
    shift = len(message.content) - len(content)
    marks = tuple(max(mark - shift, 1) if mark else 0 for mark in message.marks)
    return msgspec.structs.replace(message, content=content, marks=marks)


def _in_order(tool: ToolSpec) -> ToolSpec:
    definition = dict(tool.definition)
    inner = definition.get("function")
    if isinstance(inner, Mapping) and isinstance(inner.get("parameters"), Mapping):
        definition["function"] = {**inner, "parameters": _schema(inner["parameters"])}
    return msgspec.structs.replace(tool, definition=definition)


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {key: _keyword(key, value[key]) for key in sorted(value, key=_rank)}


def _keyword(key: str, value: Any) -> Any:
    if key in VALUES:
        return value
    if key in SCHEMA_MAPS and isinstance(value, Mapping):
        return {name: _schema(value[name]) for name in sorted(value)}
    return _schema(value)


def _rank(key: str) -> tuple[int, str]:
    place = SCHEMA_ORDER.index(key) if key in SCHEMA_ORDER else len(SCHEMA_ORDER)
    return place, key


def _differs(one: Conversation, other: Conversation) -> bool:
    """Mappings are equal in any order; their JSON is not."""
    if one.tools is other.tools or one != other:
        return one != other
    return _json(one.tools) != _json(other.tools)


def _json(tools: Sequence[ToolSpec]) -> list[bytes]:
    return [msgspec.json.encode(tool.definition) for tool in tools]
