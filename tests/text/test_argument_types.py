from typing import Any

import pytest

from daemon.text.argument_types import typed_value

POINT = {"type": "object", "properties": {"x": {"type": "number"}}}
ROOT: dict[str, Any] = {
    "properties": {},
    "$defs": {
        "point": POINT,
        "tree": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        "a/b": {"type": "integer"},
    },
}

CASES: list[tuple[str, object, object]] = [
    ("42", {"type": "string"}, "42"),
    (" padded ", {"type": "string"}, " padded "),
    ("42", {"type": "integer"}, 42),
    ("42.0", {"type": "integer"}, 42),
    ("4.5", {"type": "integer"}, "4.5"),
    ("042", {"type": "integer"}, "042"),
    ("42", {"type": "number"}, 42),
    ("-1e-07", {"type": "number"}, -1e-07),
    ("1e999", {"type": "number"}, "1e999"),
    ("NaN", {"type": "number"}, "NaN"),
    ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ("true", {"type": "boolean"}, True),
    ("False", {"type": "boolean"}, False),
    ("yes", {"type": "boolean"}, "yes"),
    ("None", {"type": "null"}, None),
    ("null", {"type": ["string", "null"]}, None),
    ("nothing", {"type": ["string", "null"]}, "nothing"),
    ("null", {"type": "string"}, "null"),
    ("null", {"type": "string", "nullable": True}, None),
    ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
    ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
    ("[1, 2]", {"type": "object"}, "[1, 2]"),
    ("[1, true]", {"type": "array"}, [1, True]),
    ("[NaN]", {"type": "array"}, "[NaN]"),
    ("[1e999]", {"type": "array"}, "[1e999]"),
    ('["\\ud800"]', {"type": "array"}, '["\\ud800"]'),
    ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ("[1]", {"items": {"type": "integer"}}, [1]),
    ('{"x": 1}', {"properties": {}}, {"x": 1}),
    ("3", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 3),
    ("x", {"oneOf": [{"type": "boolean"}, {"type": "string"}]}, "x"),
    ("2", {"enum": [1, 2]}, 2),
    ("2", {"enum": ["1", "2"]}, "2"),
    ("2", {"enum": ["2", 3]}, "2"),
    ("None", {"const": None}, None),
    ('{"x": 1}', {"$ref": "#/$defs/point"}, {"x": 1}),
    ("7", {"$ref": "#/$defs/a~1b"}, 7),
    ("None", {"$ref": "#/$defs/tree"}, None),
    ("7", {"$ref": "#/$defs/absent"}, "7"),
    ("7", {"$ref": "https://example.org/schema"}, "7"),
    ("7", {}, "7"),
    ("true", None, "true"),
    ('{"a": 1}', None, {"a": 1}),
    ("[1]", True, [1]),
    ("{a}", None, "{a}"),
    ("7", {"type": 3, "anyOf": 4, "enum": 5, "$ref": 6}, "7"),
]


@pytest.mark.parametrize(("text", "schema", "value"), CASES)
def test_values_get_the_schemas_type(text: str, schema: object, value: object) -> None:
    found = typed_value(text, schema, ROOT)
    assert (found, type(found)) == (value, type(value))
