"""One `<tool_call>` in the XML wire format of Qwen 3.5 → a name and typed arguments.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Nothing in a VALUE is escaped, so it may hold these very tags. What the template writes is read
back unless a value spells the end of its own call. Pure functions; any thread.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from daemon.text.argument_types import typed_value
from daemon.text.messages import ToolSpec

OPENING = "<tool_call>"
CLOSING = "</tool_call>"
HEAD = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*")
FOOT = re.compile(r"</function>\s*</tool_call>\Z")
FUNCTION_END = re.compile(r"</function>\s*</tool_call>")
PARAMETER = re.compile(r"<parameter=([^>\n]+)>(\n?)")
NESTED = re.compile(r"<tool_call>\s*<function=")
CANONICAL_END = re.compile(r"\n</parameter>\n(?=<parameter=([^>\n]+)>|</function>\n</tool_call>\Z)")
LENIENT_END = re.compile(
    r"\n?</parameter>\s*(?=<parameter=([^>\n]+)>|</function>\s*</tool_call>\Z)"
)


class ParsedCall(Struct, frozen=True):
    """What the model asks for; `arguments` in the order it wrote them."""

    name: str
    arguments: Mapping[str, Any]


class Scan(Struct, frozen=True):
    """How far a call in a growing text is known.

    "open": more text decides; look again from `stop`. "call": `call` ends at `stop`.
    "malformed": no text that follows makes it a call.
    """

    status: Literal["open", "call", "malformed"]
    stop: int = 0
    call: ParsedCall | None = None


def scan_call(text: str, start: int, tools: Mapping[str, ToolSpec], final: bool) -> Scan:
    """Look for the end of the call that `text` begins with, at closing tags from `start` on.

    Args:
        final: no more text will come.
    """
    stop = text.find(CLOSING, start)
    while stop >= 0:
        stop += len(CLOSING)
        call = parse_call(text[:stop], tools)
        if call:
            return Scan("call", stop, call)
        if not _is_inside_value(text[:stop]):
            return Scan("malformed")
        start, stop = stop, text.find(CLOSING, stop)
    if final:
        return _scan_without_nesting(text, tools)
    return Scan("open", max(start, len(text) - len(CLOSING) + 1))


def parse_call(
    text: str, tools: Mapping[str, ToolSpec], *, nesting: bool = True
) -> ParsedCall | None:
    """Read a whole `<tool_call>…</tool_call>`; None when it is malformed.

    A call of an unknown tool is still a call; its arguments, like a known tool's undeclared ones,
    stay strings unless they are a whole JSON object or array.

    Args:
        nesting: a complete call inside a value belongs to the value.
    """
    head = HEAD.match(text)
    if not head:
        return None
    values = _values(text, head.end(), nesting)
    if values is None:
        return None
    name = head[1].strip()
    schema = tools[name].parameters if name in tools else {}
    declared = schema.get("properties")
    properties = declared if isinstance(declared, Mapping) else {}
    arguments = {key: typed_value(v, properties.get(key), schema) for key, v in values.items()}
    return ParsedCall(name, arguments)


def _scan_without_nesting(text: str, tools: Mapping[str, ToolSpec]) -> Scan:
    """A value that only begins a call makes the nested reading fail: read it flat."""
    end = FUNCTION_END.search(text)
    call = parse_call(text[: end.end()], tools, nesting=False) if end else None
    return Scan("call", end.end(), call) if end and call else Scan("malformed")


def _is_inside_value(text: str) -> bool:
    head = HEAD.match(text)
    return head is not None and PARAMETER.match(text, head.end()) is not None


def _values(text: str, at: int, nesting: bool) -> dict[str, str] | None:
    values: dict[str, str] = {}
    while not FOOT.match(text, at):
        opening = PARAMETER.match(text, at)
        end = _value_end(text, opening, {*values, opening[1]}, nesting) if opening else None
        if not opening or not end:
            return None
        values[opening[1]] = text[opening.end() : end.start()]
        at = end.end()
    return values


def _value_end(
    text: str, opening: re.Match[str], given: set[str], nesting: bool
) -> re.Match[str] | None:
    """Where a value ends: as the template writes it, or less strictly if that is nowhere.

    A value that began on a new line may be empty, hence the step back over that newline.
    """
    canonical = bool(opening[2])
    patterns = (CANONICAL_END, LENIENT_END) if canonical else (LENIENT_END,)
    starts = (opening.end() - 1, opening.end())[-len(patterns) :]
    found = (
        _find_end(pattern, text, start, given, nesting)
        for pattern, start in zip(patterns, starts, strict=True)
    )
    return next((end for end in found if end), None)


def _find_end(
    pattern: re.Pattern[str], text: str, start: int, given: set[str], nesting: bool
) -> re.Match[str] | None:
    """The first end that lies in no nested call; a name is given once, so again it is text."""
    while end := pattern.search(text, start):
        nested = NESTED.search(text, start, end.start()) if nesting else None
        if nested:
            start = _after_nested(text, nested)
        elif end[1] in given:
            start = end.end()
        else:
            return end
    return None


def _after_nested(text: str, opening: re.Match[str]) -> int:
    """The end of a complete nested call, or of its opening if it is incomplete."""
    depth = 1
    at = opening.end()
    while depth:
        close = text.find(CLOSING, at)
        if close < 0:
            return opening.end()
        depth += len(NESTED.findall(text, at, close)) - 1
        at = close + len(CLOSING)
    return at
