"""Another order of keys changes nothing, another value does."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from daemon.text.messages import ToolSpec
from daemon.text.tool_spellings import ToolSpellings

names = st.text("abc_", max_size=3)
values = st.recursive(
    st.integers() | st.text("xyz", max_size=3) | st.booleans() | st.none(),
    lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=6,
)
schemas = st.dictionaries(names, values, max_size=4)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def tool(parameters: dict[str, Any]) -> ToolSpec:
    return ToolSpec("f", parameters, {"type": "function", "function": {"parameters": parameters}})


@given(first=schemas, other=schemas)
def test_a_tool_keeps_its_first_spelling(first: dict[str, Any], other: dict[str, Any]) -> None:
    spellings = ToolSpellings()
    spellings.first(tool(first))
    again = spellings.first(tool(reversed_keys(first)))
    assert json.dumps(again.definition) == json.dumps(tool(first).definition)
    assert json.dumps(again.parameters) == json.dumps(first)
    if json.dumps(other, sort_keys=True) != json.dumps(first, sort_keys=True):
        assert json.dumps(spellings.first(tool(other)).parameters) == json.dumps(other)


def test_the_tools_used_last_are_kept() -> None:
    spellings = ToolSpellings(max_tools=2)
    for name in ("one", "two", "three"):
        spellings.first(tool({name: 1, "x": 2}))
    shown = [spellings.first(tool({"x": 2, name: 1})).parameters for name in ("three", "one")]
    assert [list(parameters) for parameters in shown] == [["three", "x"], ["x", "one"]]
