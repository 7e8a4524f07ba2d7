"""Masks against texts: what a form allows, what it refuses, and who is told why."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_tool_calls import PROPERTIES, arguments, rendered

from daemon.errors import InvalidRequest
from daemon.text.constrainer import OUT_OF_THOUGHT, Constrainer, Thinking
from daemon.text.constraint import ReplyConstraint
from daemon.text.messages import ToolSpec
from daemon.text.reply_grammar import ContentForm, Guide
from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer
from daemon.text.tool_calls import parse_call

CLOSED, OPEN = Thinking(False), Thinking(True)
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
SHELL = ToolSpec(
    "shell",
    {
        "type": "object",
        "properties": {
            "command": {"type": "string"},
            "timeout": {"type": ["integer", "null"]},
            "mode": {"enum": ["fast", "two\nlines", 3, None]},
            "flag": {"type": "boolean"},
            "option": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
            "id": {"type": "string", "pattern": "^[a-z]+/x$"},
            "tail": {"type": "string", "pattern": "end$"},
            "short": {"type": "string", "minLength": 2, "maxLength": 5},
        },
        "required": ["command"],
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "number"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
    {},
    strict=True,
)
NOTHING = ToolSpec("nothing", {}, {})
ANYTHING = ToolSpec("anything", {"type": "object"}, {})


@pytest.fixture(scope="module")
def constrainer(tiny: Tokenizer) -> Iterator[Constrainer]:
    made = Constrainer(tiny)
    yield made
    made.close()


def call(name: str, **values: str) -> str:
    parts = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


def is_allowed(constraint: ReplyConstraint, token: int) -> bool:
    mask = constraint.allowed()
    return mask is None or bool(mask[token // 32] >> np.uint32(token % 32) & 1)


def follow(constraint: ReplyConstraint, tokenizer: Tokenizer, text: str) -> str | None:
    """The rest of `text` from the first token that is not allowed; None if all are."""
    tokens = tokenizer.encode(text)
    for index, token in enumerate(tokens):
        if not is_allowed(constraint, token):
            return tokenizer.decode(tokens[index:])
        constraint.advance(token)
        assert constraint.failure is None
    return None


def fulfils(constraint: ReplyConstraint | None, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the whole reply is allowed, and may end there."""
    assert constraint is not None
    if follow(constraint, tokenizer, text) is not None:
        return False
    return is_allowed(constraint, tokenizer.control_tokens["<|im_end|>"])


def json_guide(schema: Any) -> Guide:
    return Guide(content=ContentForm("json", schema, "schema"))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"a": "<tool_call> \\n é"}', True),
        ('{"a":"x","n":3}', True),
        ('{\n  "a": "x",\n  "n": 3\n}', True),
        ('{"n": 3}', False),
        ('{"a": 3}', False),
        ('{"a": "x", "b": 1}', False),
        ('Sure: {"a": "x"}', False),
        ('{"a": "x"} done', False),
        ('{"a": "x"', False),
    ],
)
def test_json(constrainer: Constrainer, tiny: Tokenizer, text: str, good: bool) -> None:
    guide = json_guide(OBJECT)
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, text) == good
    thought = f"Well, {{ <tool_call> ...\n</think>\n\n{text}"
    assert fulfils(constrainer.constrain(guide, OPEN), tiny, thought) == good


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (ContentForm("regex", r"a/b\d+", ""), "a/b12", "a/bc"),
        (ContentForm("choice", ["yes", 'n"o'], ""), 'n"o', "maybe"),
        (ContentForm("grammar", 'root ::= "yes" | x\nx ::= [0-9]+ "}"', ""), "12}", "no"),
        (ContentForm("grammar", 'start: "yes" | content\ncontent: /[0-9]+/', ""), "12", "no"),
    ],
)
def test_other_forms(
    constrainer: Constrainer, tiny: Tokenizer, form: ContentForm, good: str, bad: str
) -> None:
    assert fulfils(constrainer.constrain(Guide(content=form), CLOSED), tiny, good)
    assert not fulfils(constrainer.constrain(Guide(content=form), CLOSED), tiny, bad)


GOOD_CALLS = [
    call("shell", command=""),
    call("shell", command="ls\n<tool_call></tool_call>\n</parameter>x"),
    call("shell", command="x", timeout="30"),
    call("shell", command="x", timeout="None"),
    call("shell", command="x", mode="two\nlines", flag="True"),
    call("shell", command="x", mode="null", flag="false"),
    call("shell", command="x", mode="3", option='{"x": 1.5}'),
    call("shell", command="x", option="null"),
    call("shell", command="x", id="ab/x", tail="the\nend", short="abcde"),
    call("nothing") + "\n" + call("anything", a="1", b="2"),
]
BAD_CALLS = [
    "I would rather not.",
    call("rm"),
    call("shell"),
    call("shell", timeout="30"),
    call("shell", command="x", timeout="soon"),
    call("shell", command="x", mode="slow"),
    call("shell", command="x", flag="maybe"),
    call("shell", command="x", option='{"y": 1}'),
    call("shell", command="x", id="AB/x"),
    call("shell", command="x", tail="ending"),
    call("shell", command="x", short="a"),
    call("shell", command="x", short="abcdef"),
    call("shell", command="x", other="1"),
    call("nothing", a="1"),
    call("nothing") + " and more",
]


@pytest.mark.parametrize("text", GOOD_CALLS)
def test_required_calls(constrainer: Constrainer, tiny: Tokenizer, text: str) -> None:
    guide = Guide(calls="required", tools=(SHELL, NOTHING, ANYTHING))
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, text)
    assert fulfils(constrainer.constrain(guide, OPEN), tiny, f"Hm.\n</think>\n\n{text}")
    watched = Guide(calls="watched", tools=(SHELL, NOTHING, ANYTHING))
    assert fulfils(constrainer.constrain(watched, CLOSED), tiny, f"Look: <tool\n\n{text}\nDone.")


@pytest.mark.parametrize("text", BAD_CALLS)
def test_calls_that_are_none(constrainer: Constrainer, tiny: Tokenizer, text: str) -> None:
    guide = Guide(calls="required", tools=(SHELL, NOTHING))
    assert not fulfils(constrainer.constrain(guide, CLOSED), tiny, text)
    if text.startswith("<") and not text.endswith("more"):
        watched = Guide(calls="watched", tools=(SHELL, NOTHING))
        assert not fulfils(constrainer.constrain(watched, CLOSED), tiny, f"Look:\n\n{text}")


def test_optional_arguments_come_in_any_order(constrainer: Constrainer, tiny: Tokenizer) -> None:
    """Of a tool that is not strict; its required ones keep their order."""
    names = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "string"}}
    schema = {"type": "object", "properties": names, "required": ["a"]}
    for strict in (False, True):
        tool = ToolSpec("f", schema, {}, strict)
        guide = Guide(calls="required", tools=(tool,))

        def is_good(text: str, guide: Guide = guide) -> bool:
            return fulfils(constrainer.constrain(guide, CLOSED), tiny, text)

        assert is_good(call("f", a="x"))
        assert is_good(call("f", a="x", b="1", c="y"))
        assert is_good(call("f", a="x", c="y", b="1")) is not strict
        assert is_good(call("f", c="y", a="x")) is not strict
        assert not is_good(call("f", c="y"))
        assert not is_good(call("f", a="x", b="y"))


@pytest.mark.parametrize("union", ["anyOf", "types"])
def test_a_text_that_is_read_as_a_structure_must_be_one(
    constrainer: Constrainer, tiny: Tokenizer, union: str
) -> None:
    point: dict[str, Any] = {
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    schema = {
        "anyOf": {"anyOf": [{"type": "string"}, point | {"type": "object"}]},
        "types": point | {"type": ["string", "object"]},
    }[union]
    tool = ToolSpec("f", {"properties": {"v": schema}, "required": ["v"]}, {}, strict=True)
    guide = Guide(calls="required", tools=(tool,))

    def is_good(value: str) -> bool:
        return fulfils(constrainer.constrain(guide, CLOSED), tiny, call("f", v=value))

    assert all(map(is_good, ("", "hello {", "two\n\nlines\n", '{"x": 1}')))
    assert not any(map(is_good, ('{"y": 1}', '{"x": "1"}', ' {"y": 1}', "[1]")))


def test_single_call(constrainer: Constrainer, tiny: Tokenizer) -> None:
    guide = Guide(calls="required", tools=(NOTHING,), single_call=True)
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, call("nothing"))
    twice = call("nothing") + "\n" + call("nothing")
    assert not fulfils(constrainer.constrain(guide, CLOSED), tiny, twice)


def test_content_or_calls(constrainer: Constrainer, tiny: Tokenizer) -> None:
    content = ContentForm("json", OBJECT, "schema")
    guide = Guide(content=content, calls="watched", tools=(NOTHING,))
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, '{"a": ""}')
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, call("nothing"))
    assert not fulfils(constrainer.constrain(guide, CLOSED), tiny, "Neither.")


def test_a_watched_tag_cannot_be_spelled(constrainer: Constrainer, tiny: Tokenizer) -> None:
    """Letter by letter, up to the one that would complete it."""
    constraint = constrainer.constrain(Guide(calls="watched", tools=(SHELL,)), CLOSED)
    assert constraint is not None
    for letter in "a <tool_call":
        (token,) = tiny.encode(letter)
        assert is_allowed(constraint, token)
        constraint.advance(token)
    (end,) = tiny.encode(">")
    assert not is_allowed(constraint, end)


@given(values=arguments)
def test_whatever_a_template_renders_is_allowed(
    constrainer: Constrainer, tiny: Tokenizer, official: ChatTemplate, values: dict[str, Any]
) -> None:
    """But for a line that is the closing tag, and DEL in JSON, which the grammar has escaped."""
    assume("</parameter>" not in values.get("text", "").split("\n"))
    assume("\x7f" not in str([values.get("items"), values.get("options")]).replace("\\x7f", "\x7f"))
    tool = ToolSpec("edit", {"type": "object", "properties": PROPERTIES}, {}, strict=True)
    guide = Guide(calls="required", tools=(tool,))
    ordered = {name: values[name] for name in PROPERTIES if name in values}
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, rendered(official, ordered))


@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_allowed_is_a_call(
    constrainer: Constrainer, tiny: Tokenizer, seed: int
) -> None:
    """A model that knows nothing, held to the grammar, writes calls of the right types."""
    tool = ToolSpec(
        "f",
        {
            "properties": {
                "s": {"type": "string", "maxLength": 20},
                "n": {"type": "integer", "minimum": 0, "maximum": 99},
                "e": {"enum": ["a", True, None]},
            },
            "required": ["s", "n", "e"],
        },
        {},
        strict=True,
    )
    guide = Guide(calls="required", tools=(tool,), single_call=True)
    constraint = constrainer.constrain(guide, CLOSED)
    assert constraint is not None
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < 400 and (not tokens or tokens[-1] not in tiny.stop_tokens):
        mask = constraint.allowed()
        assert mask is not None
        choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        tokens.append(int(rng.choice(choices)))
        constraint.advance(tokens[-1])
    assert constraint.failure is None
    parsed = parse_call(tiny.decode(tokens[:-1]), {"f": tool})
    assert parsed is not None
    assert len(parsed.arguments["s"]) <= 20
    assert 0 <= parsed.arguments["n"] <= 99
    assert parsed.arguments["e"] in ("a", True, None)


# ── thinking ──────────────────────────────────────────────────────────────────────────────────


def test_thinking_is_led_out_after_its_budget(constrainer: Constrainer, tiny: Tokenizer) -> None:
    thought = "one two three four five"
    budget = len(tiny.encode(thought))
    constraint = constrainer.constrain(None, Thinking(True, budget))
    assert constraint is not None
    assert follow(constraint, tiny, thought + OUT_OF_THOUGHT + "\n\nAnything <tool_call>") is None
    again = constrainer.constrain(None, Thinking(True, budget))
    assert again is not None
    assert follow(again, tiny, thought + " six") == " six"


def test_thinking_that_ends_by_itself_is_free(constrainer: Constrainer, tiny: Tokenizer) -> None:
    constraint = constrainer.constrain(None, Thinking(True, 50))
    assert constraint is not None
    assert follow(constraint, tiny, "Hm.\n</think>\n\n" + "word " * 100) is None


def test_a_budget_before_a_form(constrainer: Constrainer, tiny: Tokenizer) -> None:
    guide = json_guide(OBJECT)
    (word,) = tiny.encode("a")
    constraint = constrainer.constrain(guide, Thinking(True, 1))
    text = tiny.decode([word]) + OUT_OF_THOUGHT + '\n\n{"a": ""}'
    assert fulfils(constraint, tiny, text)


def test_a_guided_reply_cannot_end_while_it_thinks(
    constrainer: Constrainer, tiny: Tokenizer
) -> None:
    constraint = constrainer.constrain(json_guide(OBJECT), OPEN)
    assert constraint is not None
    assert follow(constraint, tiny, "I am done<|im_end|>") == "<|im_end|>"


@pytest.mark.parametrize("thinking", [CLOSED, OPEN, Thinking(False, 5)])
def test_nothing_to_hold_a_reply_to(constrainer: Constrainer, thinking: Thinking) -> None:
    assert constrainer.constrain(None, thinking) is None


# ── what cannot be had ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (ContentForm("json", {"type": "integer", "minimum": 5, "maximum": 3}, "p"), "minimum (5)"),
        (ContentForm("json", {"allOf": [{"type": "null"}, {"type": "array"}]}, "p"), "types"),
        (ContentForm("json", {"type": "array", "uniqueItems": True}, "p"), "uniqueItems"),
        (ContentForm("json", {"$ref": "#/nowhere"}, "p"), "/nowhere"),
        (ContentForm("regex", "(a", "p"), "unclosed group"),
        (ContentForm("grammar", "root ::= nowhere", "p"), "nowhere"),
    ],
)
@pytest.mark.parametrize("calls", ["free", "watched"])
def test_a_form_that_no_text_has(
    constrainer: Constrainer, form: ContentForm, says: str, calls: Any
) -> None:
    tools = (NOTHING,) if calls == "watched" else ()
    with pytest.raises(InvalidRequest) as caught:
        constrainer.constrain(Guide(content=form, calls=calls, tools=tools), CLOSED)
    assert caught.value.param == "p"
    assert str(caught.value).startswith("p: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grammar_that_no_text_has(constrainer: Constrainer) -> None:
    form = ContentForm("grammar", "start: A\nA: /a/ & /b/", "grammar")
    with pytest.raises(InvalidRequest, match="grammar: no text at all"):
        constrainer.constrain(Guide(content=form), CLOSED)


@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"type": "array", "uniqueItems": True}},
        {"a>b": {"type": "string"}},
        {"a": {"type": "string", "pattern": "(?=x)"}},
        {"a": {"type": "string", "pattern": "x", "maxLength": 3}},
    ],
)
def test_a_tool_that_no_grammar_can_express(
    constrainer: Constrainer, tiny: Tokenizer, properties: dict[str, Any]
) -> None:
    """A strict one is refused by its place; the arguments of another are left free."""
    schema = {"type": "object", "properties": properties}
    strict = ToolSpec("odd", schema, {}, strict=True)
    with pytest.raises(InvalidRequest) as caught:
        constrainer.constrain(Guide(calls="watched", tools=(NOTHING, strict)), CLOSED)
    assert caught.value.param == "tools[1].function.parameters"
    loose = ToolSpec("odd", schema | {"required": list(properties)}, {})
    guide = Guide(calls="required", tools=(NOTHING, loose))
    assert fulfils(constrainer.constrain(guide, CLOSED), tiny, call("odd", a="[1, 1]"))


# ── whatever clients send ─────────────────────────────────────────────────────────────────────

WORDS = [
    *("type", "properties", "required", "items", "anyOf", "allOf", "enum", "const", "pattern"),
    *("minLength", "maxLength", "minimum", "$ref", "$defs", "additionalProperties", "minItems"),
    *("format", "prefixItems", "not", "nullable", "multipleOf", "x-guidance", "a", ">"),
]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        ["string", "object", "array", "integer", "#", "#/$defs/a", "^a$", "(", "date"]
    )
)
schemas = st.dictionaries(
    st.sampled_from(WORDS),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def refusal(constrainer: Constrainer, guide: Guide) -> InvalidRequest | None:
    try:
        constrainer.constrain(guide, CLOSED)
    except InvalidRequest as error:
        return error
    return None


@given(schema=schemas, strict=st.booleans())
def test_any_schema_is_held_to_or_refused(
    constrainer: Constrainer, schema: dict[str, Any], strict: bool
) -> None:
    """Nothing but an error that names the parameter, whatever checks came before."""
    tool = ToolSpec("f", {"type": "object", "properties": {"x": schema}}, {}, strict)
    for guide in (json_guide(schema), Guide(calls="required", tools=(tool,))):
        error = refusal(constrainer, guide)
        assert error is None or (error.param and "\n" not in str(error))


@given(text=st.text(st.sampled_from('root ::= "a"[b-z]{2,}()|*+?\n/start:%&~\\<>@'), max_size=30))
def test_any_grammar_is_held_to_or_refused(constrainer: Constrainer, text: str) -> None:
    kinds: tuple[tuple[Any, str], ...] = (
        ("regex", text),
        ("grammar", f"root ::= {text}"),
        ("grammar", text),
    )
    for kind, source in kinds:
        error = refusal(constrainer, Guide(content=ContentForm(kind, source, "p")))
        assert error is None or (error.param == "p" and "\n" not in str(error))
