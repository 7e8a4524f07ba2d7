"""The tools that a client offers: from its JSON to ToolSpecs, refusing what is no schema.

Owns the checks, so that parsing a call's arguments by the schema can rely on its form. Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from daemon.api.request_body import invalid
from daemon.errors import InvalidRequest
from daemon.text.messages import ToolSpec

MAX_DEPTH = 64

_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
_ONE = ("additionalProperties", "contains", "else", "if", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


class Function(Struct):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Meta(pattern=r"^[^\s<>]{1,256}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def tool_specs(
    definitions: Sequence[dict[str, Any]],
) -> tuple[tuple[ToolSpec, ...], tuple[str, ...]]:
    """Check and convert the value of `tools` as chat clients send it.

    Returns:
        The functions; and, to be told to the client, what was passed over: tools of other types,
        which the provider would have run.

    Raises:
        InvalidRequest: a name twice, or parameters that are no JSON schema.
    """
    specs: list[ToolSpec] = []
    passed_over: list[str] = []
    for index, definition in enumerate(definitions):
        path = f"tools[{index}]"
        kind = definition.get("type", "function")
        if kind == "function":
            specs.append(_spec(definition, path))
            refuse_twice(specs, path)
        else:
            passed_over.append(f"{path} ({kind})")
    return tuple(specs), tuple(passed_over)


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any], strict: bool = False
) -> ToolSpec:
    """A tool as the template is shown it, from a dialect that writes it otherwise."""
    function = {"name": name, "description": description or "", "parameters": parameters}
    return ToolSpec(name, parameters, {"type": "function", "function": function}, strict)


def refuse_twice(specs: Sequence[ToolSpec], path: str) -> None:
    """Check that the last one has a name of its own.

    Raises:
        InvalidRequest: an earlier one has it too.
    """
    if any(spec.name == specs[-1].name for spec in specs[:-1]):
        raise InvalidRequest(f"{path}: there are two tools named {specs[-1].name!r}.", path)


def _spec(definition: dict[str, Any], path: str) -> ToolSpec:
    function = read_function(definition.get("function"), f"{path}.function")
    return ToolSpec(function.name, function.parameters or {}, definition, bool(function.strict))


def read_function(given: object, path: str) -> Function:
    """Check a function's form and its schema.

    Raises:
        InvalidRequest: names the place below `path`.
    """
    try:
        function = msgspec.convert(given, Function)
    except msgspec.ValidationError as error:
        raise invalid(error, path) from error
    check_parameters(function.parameters or {}, f"{path}.parameters")
    return function


def check_parameters(parameters: dict[str, Any], path: str) -> None:
    """Check the schema of a call's arguments.

    Raises:
        InvalidRequest: names the place below `path`.
    """
    check_schema(parameters, path)
    if parameters.get("type", "object") != "object":
        raise _no_schema(f"{path}.type", 'must be "object"')


def check_schema(schema: object, path: str, depth: int = 0) -> None:
    """Check the form of a JSON schema as far as it matters to typing a call's arguments.

    Raises:
        InvalidRequest: names the place below `path`.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _no_schema(path, "must be an object or a boolean")
    if depth > MAX_DEPTH:
        raise _no_schema(path, f"is nested deeper than {MAX_DEPTH}")
    _check_type(schema.get("type"), f"{path}.type")
    _check_keywords(schema, path)
    for place, child in _children(schema, path):
        check_schema(child, place, depth + 1)


def _check_type(value: object, path: str) -> None:
    names = value if isinstance(value, list) else [value]
    if value is None:
        return
    if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise _no_schema(path, f"{value!r} is not one of {', '.join(sorted(_TYPES))}")


def _check_keywords(schema: Mapping[str, Any], path: str) -> None:
    for key, kind, what in (
        ("enum", list, "a list"),
        ("required", list, "a list of names"),
        ("$ref", str, "a string"),
        *((key, list, "a list of schemas") for key in _LISTS),
        *((key, dict, "an object of schemas") for key in _MAPS),
    ):
        if key in schema and not isinstance(schema[key], kind):
            raise _no_schema(f"{path}.{key}", f"must be {what}")
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise _no_schema(f"{path}.required", "must be a list of names")


def _children(schema: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    found = [(f"{path}.{key}", schema[key]) for key in _ONE if key in schema]
    items = schema.get("items", True)
    lists = [(key, schema[key]) for key in _LISTS if key in schema]
    lists += [("items", items)] if isinstance(items, list) else []
    found += [] if isinstance(items, list) else [(f"{path}.items", items)]
    for key, members in lists:
        found += [(f"{path}.{key}[{index}]", member) for index, member in enumerate(members)]
    for key in _MAPS:
        found += [(f"{path}.{key}.{name}", child) for name, child in schema.get(key, {}).items()]
    return found


def _no_schema(path: str, what: str) -> InvalidRequest:
    said = " ".join(f"{path} {what}".split())
    return InvalidRequest(f"{said}: this is no JSON schema.", path)
