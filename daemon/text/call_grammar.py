"""Tools → the Lark rules of calls to them, in the XML wire format of Qwen 3.5 (see tool_calls.py).

Owns which spellings of an argument its schema allows. A string stands raw between its tags, line
by line, up to a line that is the closing tag: no escapes, so any text without that line. Any other
value is JSON, or Python's spelling of a constant, which the model's own template writes.
Pure functions; any thread.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from daemon.errors import InvalidRequest
from daemon.text.argument_types import constraints_of, members_of, types_of
from daemon.text.messages import ToolSpec

NEWLINE = "\n"
END = "\n</parameter>\n"
TEXT_RULES = r"""
text: LINE* TEXT_END
LINE: /[^\n]*\n/ & ~/<\/parameter>\n/
TEXT_END: "</parameter>\n"
plain_text: (FIRST_LINE LINE* | "\n")? TEXT_END
FIRST_LINE: /[^\s{\[][^\n]*\n/ & ~/<\/parameter>\n/
any_parameters: any_parameter*
any_parameter: "<parameter=" /[^>\n]+/ ">\n" text
"""
"""A text ends with its tag, which has a line of its own. A plain one is not read as JSON."""

PYTHON_SPELLINGS = {"boolean": '"True" | "False"', "null": '"None"'}
DEFINITIONS = ("$defs", "definitions")
STRING_LIMITS = ("pattern", "minLength", "maxLength")
WHITESPACE = r"[ ]{0,2}|\n[ \t]{0,60}"


class CallRules:
    """Collects the rules of several tools; equal values share one.

    Attributes:
        functions: the names of the tools' rules: each is what follows `<function=`.
    """

    def __init__(self) -> None:
        self.functions: list[str] = []
        self._rules: list[str] = []
        self._values: dict[str, str] = {}

    def add(self, tool: ToolSpec) -> None:
        """Add a call whose parameters have the schema's types.

        A strict tool's come in the schema's order, each once at most. Another's optional ones come
        anywhere between the required ones: a model that is used to another order keeps to it.
        Where no parameters are declared, any may be given, as text. So with `add_loose`.

        Raises:
            InvalidRequest: a name or a schema that the wire format cannot carry.
        """
        schema = tool.parameters
        declared = schema.get("properties", {})
        required = schema.get("required", ())
        if missing := [name for name in required if name not in declared]:
            raise InvalidRequest(f"the required parameter {missing[0]!r} is not declared")
        if not declared and schema and schema.get("additionalProperties") is not False:
            return self.add_loose(tool)
        parts = {name: f"({self._parameter(name, part, tool)})" for name, part in declared.items()}
        if tool.strict:
            order = [part + ("" if name in required else "?") for name, part in parts.items()]
            return self._add(tool, " ".join(order) or '""')
        optional = [part for name, part in parts.items() if name not in required]
        between = f"({' | '.join(optional)})*" if optional else ""
        order = [f"{part} {between}" for name, part in parts.items() if name in required]
        return self._add(tool, " ".join((between, *order)).strip() or '""')

    def add_loose(self, tool: ToolSpec) -> None:
        """Add a call that may have any parameters."""
        self._add(tool, "any_parameters")

    def text(self, opening: int, closing: int) -> str:
        """The rules, with `call` for one whole call.

        Args:
            opening, closing: the ids of `<tool_call>` and `</tool_call>`.
        """
        call = rf'call: <[{opening}]> "\n<function=" function "</function>\n" <[{closing}]>'
        choice = f"function: {' | '.join(self.functions)}"
        return "\n".join((call, choice, *self._rules)) + TEXT_RULES

    def _add(self, tool: ToolSpec, body: str) -> None:
        name = f"function_{len(self.functions)}"
        self.functions.append(name)
        self._rules.append(f"{name}: {quoted(f'{tool.name}>{NEWLINE}')} {body}")

    def _parameter(self, name: str, schema: Any, tool: ToolSpec) -> str:
        if ">" in name or NEWLINE in name or not name:
            raise InvalidRequest(f"the parameter name {name!r} cannot be written in a call")
        return f"{quoted(f'<parameter={name}>{NEWLINE}')} {self._value(schema, tool)}"

    def _value(self, schema: Any, tool: ToolSpec) -> str:
        """The rule for a value with its closing tag. Text includes whatever else is allowed."""
        if branches := _branches(schema):
            names = dict.fromkeys(self._value(branch, tool) for branch in branches)
            if "text" in names and (len(names) == 1 or not tool.strict):
                return "text"
            return f"({' | '.join(names)})".replace("text", "plain_text")
        definition = value_rule(schema, tool)
        if definition == "text":
            return "text"
        if definition not in self._values:
            self._values[definition] = f"value_{len(self._values)}"
            self._rules.append(self._values[definition] + definition)
        return self._values[definition]


def value_rule(schema: Any, tool: ToolSpec) -> str:
    """What the Lark rule for a value says after its name; "text" for the rule of that name.

    Raises:
        InvalidRequest: two limits on a string that cannot be held together.
    """
    constraints = list(constraints_of(schema, tool.parameters))
    members = [member for part in constraints for member in members_of(part)]
    types = {name for part in constraints for name in types_of(part)}
    if members:
        return f": ({' | '.join(map(_member, members))}) {quoted(END)}"
    if not types:
        return "text"
    if types == {"string"}:
        return _string_rule(constraints)
    if "string" in types:
        structured = tool.strict and types & {"object", "array"}
        schema_or_text = f": plain_text | (%json {_json_schema(schema, tool)}) {quoted(END)}"
        return schema_or_text if structured else "text"
    choices = [f"%json {_json_schema(schema, tool)}"]
    choices += [spelled for name, spelled in PYTHON_SPELLINGS.items() if name in types]
    if any(part.get("nullable") is True for part in constraints):
        choices.append('"null" | "None"')
    return f": ({' | '.join(choices)}) {quoted(END)}"


def quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """A Lark regular expression; a `/` in it is escaped once."""
    escaped = pattern.replace(r"\/", "/").replace("/", r"\/").replace("\n", r"\n")
    return f"/{escaped}/"


def _member(member: object) -> str:
    if isinstance(member, str):
        return quoted(member)
    spellings = {json.dumps(member, ensure_ascii=False): None}
    if member is None or isinstance(member, bool):
        spellings[str(member)] = None
    return " | ".join(map(quoted, spellings))


def _string_rule(constraints: Sequence[Mapping[str, Any]]) -> str:
    limits = {key: part[key] for part in constraints for key in STRING_LIMITS if key in part}
    if not limits:
        return "text"
    if "pattern" in limits and len(limits) > 1:
        raise InvalidRequest("a pattern together with minLength or maxLength is not supported")
    least, most = limits.get("minLength", 0), limits.get("maxLength", "")
    pattern = limits.get("pattern")
    inner = f"(?s:.{{{least},{most}}})" if pattern is None else _unanchored(pattern)
    return "[lazy]: " + regex(inner + r"\n</parameter>\n")


def _unanchored(pattern: str) -> str:
    """A pattern of JSON schema finds its match anywhere unless it is anchored."""
    before = "" if pattern.startswith("^") else "(?s:.*)"
    after = "" if pattern.endswith("$") and not pattern.endswith(r"\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    return f"{before}(?:{inner if after else inner.removesuffix('$')}){after}"


def _branches(schema: Any) -> list[Any]:
    """The alternatives of a schema that is nothing but alternatives."""
    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
        return []
    lists = (schema.get("anyOf"), schema.get("oneOf"))
    return [branch for branches in lists if isinstance(branches, list) for branch in branches]


def _json_schema(schema: Any, tool: ToolSpec) -> str:
    """The schema of one property, with the definitions that it may refer to."""
    if not isinstance(schema, Mapping):
        return json.dumps(schema)
    shared = {key: tool.parameters[key] for key in DEFINITIONS if key in tool.parameters}
    if "$ref" not in json.dumps(schema):
        shared = {}
    return json_schema(shared | dict(schema), lenient=not tool.strict)


def json_schema(schema: Mapping[str, Any], *, lenient: bool) -> str:
    """A schema as `%json` takes it. Spaces are bounded: a weak model never stops writing them.

    Args:
        lenient: pass over keywords that no grammar can express.
    """
    options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
