"""The tools of /v1/responses: functions, namespaces of functions, and tools that take free text.

Owns the names under which the model sees them, and the way back to the client's. Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from daemon.api.tool_definitions import function_tool, read_function
from daemon.errors import InvalidRequest
from daemon.text.messages import ToolSpec

CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The text, as it is."}},
    "required": ["input"],
}


class ToolRoute(Struct, frozen=True):
    """How the client knows a tool. Custom ones take text in place of arguments."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class ToolNames(Struct, frozen=True):
    """The model's name of every tool, with the client's."""

    routes: Mapping[str, ToolRoute]

    def route(self, shown: str) -> ToolRoute:
        """The client's tool; one that it never offered has the name that the model gave."""
        return self.routes.get(shown, ToolRoute("function", shown))

    def shown(self, name: str, namespace: str | None) -> str:
        """What the model was shown; for tools no longer on offer too."""
        if namespace is None:
            return name
        own = self.routes.get(name)
        is_plain = own is None or own.namespace == namespace
        return name if is_plain else _qualified(namespace, name)


class OfferedTools(Struct, frozen=True):
    """The tools for the prompt, their names, and what was passed over, to be told to the client."""

    specs: tuple[ToolSpec, ...]
    names: ToolNames
    passed_over: tuple[str, ...]


class _Offer:
    def __init__(self) -> None:
        self.specs: list[ToolSpec] = []
        self.routes: dict[str, ToolRoute] = {}
        self.passed_over: list[str] = []

    def add(self, tool: Mapping[str, Any], path: str, namespace: str | None) -> None:
        """Take one tool; those that the provider would run are passed over.

        A name in a namespace stays as it is, unless an earlier tool has it.
        """
        kind = tool.get("type")
        if kind not in ("function", "custom"):
            self.passed_over.append(f"{path} ({kind})")
            return
        function = read_function(tool, path)
        name = function.name
        if name in self.routes:
            if namespace is None:
                raise InvalidRequest(f"{path}: there are two tools named {name!r}.", path)
            name = _qualified(namespace, name)
        is_custom = kind == "custom"
        parameters = CUSTOM_PARAMETERS if is_custom else function.parameters or {}
        self.routes[name] = ToolRoute(kind, function.name, namespace)
        description = _description(tool, function.description)
        strict = bool(function.strict)
        self.specs.append(function_tool(name, description, parameters, strict))


def read_tools(offered: Sequence[dict[str, Any]]) -> OfferedTools:
    """Check and convert the value of `tools`.

    Raises:
        InvalidRequest: a name twice, or parameters that are no JSON schema.
    """
    offer = _Offer()
    for index, tool in enumerate(offered):
        path = f"tools[{index}]"
        if tool.get("type") != "namespace":
            offer.add(tool, path, None)
            continue
        members = tool.get("tools")
        if not isinstance(members, list) or not all(isinstance(item, dict) for item in members):
            raise InvalidRequest(f"{path}.tools: must be a list of tools.", f"{path}.tools")
        for place, member in enumerate(members):
            offer.add(member, f"{path}.tools[{place}]", str(tool.get("name", "")))
    return OfferedTools(tuple(offer.specs), ToolNames(offer.routes), tuple(offer.passed_over))


def _description(tool: Mapping[str, Any], description: str | None) -> str | None:
    """A custom tool's grammar is shown to the model, which is not held to it."""
    form = tool.get("format")
    grammar = form.get("definition") if isinstance(form, dict) else None
    if grammar is None:
        return description
    return f"{description or ''}\n\nIts input follows this grammar:\n{grammar}"


def _qualified(namespace: str, name: str) -> str:
    return f"{namespace}.{name}"
