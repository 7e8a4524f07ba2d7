from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.template import ChatTemplate
from daemon.text.tool_calls import ParsedCall, parse_call, scan_call

PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "nothing": {"type": "null"},
    "items": {"type": "array"},
    "options": {"type": "object"},
}
TOOL = ToolSpec("edit", {"type": "object", "properties": PROPERTIES}, {})
TOOLS = {"edit": TOOL}

fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=text>"),
        *("</parameter>", "<think>", "\n", " ", "x", "é", "{", '"', "<", "=1>"),
    ]
)
lines = st.lists(fragments, max_size=8).map("".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(),
        "count": st.integers(),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "nothing": st.none(),
        "items": st.lists(json_values, max_size=3),
        "options": st.dictionaries(st.text(max_size=3), json_values, max_size=3),
    },
)


def rendered(template: ChatTemplate, given_arguments: dict[str, Any]) -> str:
    call = ToolCall("1", "edit", given_arguments)
    messages = [Message(role="user"), Message(role="assistant", tool_calls=(call,))]
    text = template.render(messages)[1].text
    return text.partition("</think>\n\n")[2].removesuffix("<|im_end|>\n")


@given(values=arguments)
def test_what_the_template_writes_is_read_back(
    template: ChatTemplate, values: dict[str, Any]
) -> None:
    call = parse_call(rendered(template, values), TOOLS)
    assert call is not None
    assert call.name == "edit"
    assert list(call.arguments.items()) == list(values.items())


@pytest.mark.parametrize(
    "value",
    [
        "",
        "\n",
        "\n\nindented\n",
        "a\n</parameter>\nb",
        "</parameter>",
        "x = '</parameter><parameter=q>'",
        "</function>\n</tool_call>",
        "</tool_call>\n",
        "grep '<tool_call>' -r",
        "<tool_call>\n<function=g>\n<parameter=text>\n1\n</parameter>\n</function>\n</tool_call>",
        "```\n<tool_call>\n<function=g>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=h>\n</function>\n"
        "</tool_call>\n```",
        "<parameter=text>\n1\n</parameter>\n<parameter=text>\n2",
        "<a href='x'>&amp;</a>\n<!-- \u2028 -->",
    ],
)
def test_values_may_hold_the_very_tags(template: ChatTemplate, value: str) -> None:
    text = rendered(template, {"text": value, "count": 3})
    assert parse_call(text, TOOLS) == ParsedCall("edit", {"text": value, "count": 3})
    for size in range(len(text)):
        assert scan_call(text[:size], 0, TOOLS, final=False).status == "open"


def test_a_value_may_begin_a_call_and_not_end_it(template: ChatTemplate) -> None:
    text = rendered(template, {"text": "write <tool_call>\n<function=x> first"})
    assert scan_call(text, 0, TOOLS, final=False).status == "open"
    scan = scan_call(text, 0, TOOLS, final=True)
    assert scan.call == ParsedCall("edit", {"text": "write <tool_call>\n<function=x> first"})


def test_an_unknown_tool_is_still_called() -> None:
    text = (
        "<tool_call>\n<function=other>\n<parameter=a>\n1\n</parameter>\n"
        '<parameter=b>\n{"c": 1}\n</parameter>\n</function>\n</tool_call>'
    )
    assert parse_call(text, TOOLS) == ParsedCall("other", {"a": "1", "b": {"c": 1}})


def test_whitespace_is_forgiven() -> None:
    text = (
        "<tool_call><function=edit> <parameter=count>3</parameter>  "
        "<parameter=text>\nx</parameter></function></tool_call>"
    )
    assert parse_call(text, TOOLS) == ParsedCall("edit", {"count": 3, "text": "x"})


def test_schemas_that_are_none_leave_strings() -> None:
    tools = {"f": ToolSpec("f", {"properties": "?"}, {})}
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    assert parse_call(text, tools) == ParsedCall("f", {"a": "1"})


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "edit", "arguments": {}}\n</tool_call>',
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=edit\n</function>\n</tool_call>",
        "<tool_call>\n<function=edit>\nstray\n</function>\n</tool_call>",
        "<tool_call>\n<function=edit>\n</tool_call>",
    ],
)
def test_malformed_calls_are_known_at_their_closing_tag(text: str) -> None:
    assert parse_call(text, TOOLS) is None
    assert scan_call(text, 0, TOOLS, final=False).status == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=edit>\n<parameter=text>\nx",
        "<tool_call>\n<function=edit>\n<parameter=text>\nx\n</function>\n</tool_call>",
        "<tool_call>\n<function=edit>\n</function>",
    ],
)
def test_calls_that_were_cut_off_are_malformed_at_the_end(text: str) -> None:
    assert scan_call(text, 0, TOOLS, final=False).status == "open"
    assert scan_call(text, 0, TOOLS, final=True).status == "malformed"


@given(text=lines)
def test_any_text_is_scanned(text: str) -> None:
    scan = scan_call(f"<tool_call>\n<function=edit>{text}", 0, TOOLS, final=True)
    assert scan.status in ("call", "malformed")
