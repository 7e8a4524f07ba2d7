"""A tool call's argument, written as text, → the JSON value that the tool's schema asks for.

Owns the reading of JSON schemas for types and the spelling of values in Qwen 3.5's templates.
Knows nothing of tags. Pure functions; any thread.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

INTEGER = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
MAX_DEPTH = 16
"""Levels of $ref and anyOf that are followed; a schema may refer to itself."""


def typed_value(text: str, schema: object, root: Mapping[str, Any]) -> Any:
    """The value of `text` under `schema`; `text` itself where no other type fits.

    Narrow types win over strings: with ["string", "null"], `null` is null. Without any declared
    type, only a whole JSON object or array is more than a string. `True`, `False` and `None` are
    what Qwen 3.5's own template writes, so they are read back.

    Args:
        root: the tool's whole schema, for `$ref`.
    """
    constraints = list(constraints_of(schema, root))
    if any(text == member for part in constraints for member in members_of(part)):
        return text
    types = {name for part in constraints for name in types_of(part)} or {"object", "array"}
    if any(part.get("nullable") is True for part in constraints):
        types.add("null")
    for name, read in READERS.items():
        if name in types:
            try:
                return read(text.strip())
            except (ValueError, RecursionError):
                continue
    return text


def constraints_of(
    schema: object, root: Mapping[str, Any], depth: int = 0
) -> Iterator[Mapping[str, Any]]:
    """A schema and all that it is composed of."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return
    yield schema
    if isinstance(schema.get("$ref"), str):
        yield from constraints_of(_resolve(schema["$ref"], root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, (list, tuple)) else ():
            yield from constraints_of(part, root, depth + 1)


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    """Follow a JSON pointer (RFC 6901) within the tool's own schema; elsewhere: nothing."""
    if not reference.startswith("#"):
        return None
    place: object = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        place = place.get(key) if isinstance(place, Mapping) else None
    return place


def members_of(schema: Mapping[str, Any]) -> list[Any]:
    enum = schema.get("enum")
    members = list(enum) if isinstance(enum, (list, tuple)) else []
    return [*members, schema["const"]] if "const" in schema else members


def types_of(schema: Mapping[str, Any]) -> list[str]:
    declared = schema.get("type")
    if isinstance(declared, str):
        return [declared]
    if isinstance(declared, (list, tuple)):
        return [name for name in declared if isinstance(name, str)]
    if members := members_of(schema):
        return [_type_of(member) for member in members]
    implied = {"properties": "object", "items": "array"}
    return [name for key, name in implied.items() if key in schema]


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string"}
    names |= {type(None): "null", list: "array", tuple: "array"}
    return names.get(type(value), "object")


def _read_null(text: str) -> None:
    if text not in ("null", "None"):
        raise ValueError(text)


def _read_boolean(text: str) -> bool:
    if text not in ("true", "True", "false", "False"):
        raise ValueError(text)
    return text in ("true", "True")


def _read_integer(text: str) -> int:
    if not (found := INTEGER.fullmatch(text)):
        raise ValueError(text)
    return int(found[1])


def _read_number(text: str) -> int | float:
    if not NUMBER.fullmatch(text):
        raise ValueError(text)
    return int(text) if text.removeprefix("-").isdigit() else _finite(text)


def _read_object(text: str) -> dict[str, Any]:
    value = _read_json(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _read_array(text: str) -> list[Any]:
    value = _read_json(text)
    if not isinstance(value, list):
        raise ValueError(text)
    return value


def _read_json(text: str) -> object:
    """Strict JSON: what is read can be written again for any client."""
    value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate: UnicodeEncodeError
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


READERS: Mapping[str, Callable[[str], Any]] = {
    "null": _read_null,
    "boolean": _read_boolean,
    "integer": _read_integer,
    "number": _read_number,
    "object": _read_object,
    "array": _read_array,
}
"""In the order in which they are tried; a string is what remains."""
