import json
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.reply_parser import ContentDelta, Delta, ReasoningDelta, ReplyParser, ToolCallDelta
from daemon.text.template import ChatTemplate

READ = ToolSpec("read", {"properties": {"n": {"type": "integer"}}}, {})
CALL = "<tool_call>\n<function=read>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"
BROKEN = "<tool_call>\n<function=read>\n<parameter=n>\n1\n</function>\n</tool_call>"

HERMES = '<tool_call>\n{"name": "read"}\n</tool_call>'


def parser(thinking_open: bool = False) -> ReplyParser:
    ids = count()
    return ReplyParser([READ], thinking_open=thinking_open, new_call_id=lambda: f"call_{next(ids)}")


def parse(pieces: list[str], thinking_open: bool = False) -> list[Delta]:
    """All deltas, neighbours of one kind joined."""
    reader = parser(thinking_open)
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    joined: list[Delta] = []
    for delta in deltas:
        if joined and type(joined[-1]) is type(delta) and not isinstance(delta, ToolCallDelta):
            joined[-1] = type(delta)(joined[-1].text + delta.text)  # type: ignore[union-attr]
        else:
            joined.append(delta)
    return joined


def R(text: str) -> ReasoningDelta:
    return ReasoningDelta(text)


def C(text: str) -> ContentDelta:
    return ContentDelta(text)


def T(index: int = 0, arguments: str = '{"n": 1}') -> ToolCallDelta:
    return ToolCallDelta(f"call_{index}", "read", arguments, index)


THINKING = [
    ("Hm.\n</think>\n\nYes.", [R("Hm."), C("Yes.")]),
    ("Hm.</think>Yes.", [R("Hm."), C("Yes.")]),
    ("Hm.\n\n</think>\n\n\nYes.", [R("Hm.\n"), C("\nYes.")]),
    ("</think>\n\nYes.", [C("Yes.")]),
    ("\n</think>\n\n", []),
    ("Hm.\n</think>\n\n" + CALL, [R("Hm."), T()]),
    ("Hm.\n</think>\n" + CALL, [R("Hm."), T()]),
    ("cut o", [R("cut o")]),
    ("cut o\n</thi", [R("cut o\n</thi")]),
    ("a <think> b\n</think>\n\nc", [R("a <think> b"), C("c")]),
    ("Hm.\n" + CALL, [R("Hm."), T()]),
    (CALL + "\n" + CALL, [T(0), T(1)]),
    ("Hm.\n" + CALL + " Or not.", [R("Hm.\n" + CALL + " Or not.")]),
    ("Hm. " + CALL, [R("Hm. " + CALL)]),
    ("Hm.\n" + BROKEN, [R("Hm.\n" + BROKEN)]),
    ("Hm.\n" + CALL + "\n</think>\n\n" + CALL, [R("Hm.\n" + CALL), T()]),
    ("a\n</think>\n\nb\n\n<think>\nc\n</think>\n\nd", [R("a"), C("b"), R("c"), C("d")]),
]

ANSWERING = [
    ("", []),
    ("Yes.", [C("Yes.")]),
    (" Yes.\n", [C(" Yes.\n")]),
    ("\n\n", []),
    ("Look:\n\n" + CALL, [C("Look:"), T()]),
    ("Look:" + CALL, [C("Look:"), T()]),
    (CALL + "\n" + CALL + "\n", [T(0), T(1)]),
    (CALL + "\n\nDone.", [T(), C("Done.")]),
    ("A\n\n" + CALL + "\nB", [C("A"), T(), C("\nB")]),
    (" \n" + CALL, [T()]),
    ("x\n\n" + BROKEN, [C("x\n\n" + BROKEN)]),
    (BROKEN + "\n" + CALL, [C(BROKEN), T()]),
    (
        'x\n<tool_call>\n{"name": "read"}\n</tool_call>',
        [C('x\n<tool_call>\n{"name": "read"}\n</tool_call>')],
    ),
    ("<tool_call>\n<function=a\n</tool_call> b", [C("<tool_call>\n<function=a\n</tool_call> b")]),
    ("the `<tool_call>` tag", [C("the `<tool_call>` tag")]),
    ("the `<think>` tag", [C("the `<think>` tag")]),
    ("<think>\nHm.\n</think>\n\nYes.", [R("Hm."), C("Yes.")]),
    ("\n <think>Hm.</think>Yes.", [R("Hm."), C("Yes.")]),
    ("a </think> b", [C("a </think> b")]),
    (CALL[:-4], [C(CALL[:-4])]),
    ("1 < 2 <", [C("1 < 2 <")]),
]


@pytest.mark.parametrize(("text", "deltas"), THINKING)
def test_replies_that_begin_thinking(text: str, deltas: list[Delta]) -> None:
    assert parse([text], thinking_open=True) == deltas
    assert parse(list(text), thinking_open=True) == deltas


@pytest.mark.parametrize(("text", "deltas"), ANSWERING)
def test_replies_that_begin_answering(text: str, deltas: list[Delta]) -> None:
    assert parse([text]) == deltas
    assert parse(list(text)) == deltas


fragments = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=read>", "</function>"),
        *("<parameter=n>", "</parameter>", "\n", "\n\n", " ", "x", "1", CALL, BROKEN, "<", "</"),
    ]
)
replies = st.lists(fragments, max_size=12).map("".join)


@given(text=replies, thinking_open=st.booleans(), data=st.data())
def test_how_a_reply_is_cut_changes_nothing(
    text: str, thinking_open: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text], thinking_open)
    assert parse(pieces, thinking_open) == whole
    assert parse(list(text), thinking_open) == whole


@given(text=replies, thinking_open=st.booleans())
def test_nothing_but_tags_and_whitespace_is_dropped(text: str, thinking_open: bool) -> None:
    deltas = parse([text], thinking_open)
    shown = "".join(_source(delta) for delta in deltas)
    for tag in ("<think>", "</think>"):
        text, shown = text.replace(tag, ""), shown.replace(tag, "")
    assert "".join(shown.split()) == "".join(text.split())


def _source(delta: Delta) -> str:
    if not isinstance(delta, ToolCallDelta):
        return delta.text
    values = json.loads(delta.arguments).items()
    parameters = "".join(f"<parameter={key}>{value}</parameter>" for key, value in values)
    return f"<tool_call><function={delta.name}>{parameters}</function></tool_call>"


words = st.text(st.sampled_from("ab <>/\n`é{"), max_size=12).map(str.strip)
argument_values: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {}, optional={"n": st.integers(), "text": words.map(lambda text: f"-{text}")}
)
tool_calls = st.lists(
    st.builds(ToolCall, id=st.just(""), name=st.just("read"), arguments=argument_values), max_size=3
)


@given(reasoning=words, content=words, calls=tool_calls)
def test_what_the_template_writes_again_is_what_was_sampled(
    template: ChatTemplate, reasoning: str, content: str, calls: list[ToolCall]
) -> None:
    def render(said: Message) -> str:
        return template.render([Message(role="user"), said])[1].text

    said = Message(role="assistant", content=content, reasoning=reasoning, tool_calls=tuple(calls))
    generation = template.render([Message(role="user")])[-1].text
    reply = render(said).removeprefix(generation).removesuffix("<|im_end|>\n")
    assert render(_message(parse([reply], thinking_open=True))) == render(said)


def _message(deltas: list[Delta]) -> Message:
    """What a client sends back of a reply."""
    return Message(
        role="assistant",
        content="".join(d.text for d in deltas if isinstance(d, ContentDelta)),
        reasoning="".join(d.text for d in deltas if isinstance(d, ReasoningDelta)),
        tool_calls=tuple(
            ToolCall(d.id, d.name, json.loads(d.arguments))
            for d in deltas
            if isinstance(d, ToolCallDelta)
        ),
    )


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = parser()
    assert reader.feed("Hello ") == [C("Hello ")]
    assert reader.feed("world\n<") == [C("world")]
    assert reader.feed("b>") == [C("\n<b>")]


def test_several_calls_come_one_by_one() -> None:
    reader = parser()
    assert reader.feed(CALL) == [T(0)]
    assert reader.feed("\n" + CALL) == [T(1)]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "content",
    [
        '{"a": "<tool_call>\n<function=read>\n</function>\n</tool_call>"}',
        "<think>not a thought</think>",
        "\n<tool_call>\n<function=read>",
        "<tool",
    ],
)
def test_content_that_has_a_form_is_what_it_is(content: str, size: int) -> None:
    parser = ReplyParser([READ], thinking_open=True, new_call_id=lambda: "call", has_form=True)
    text = f"Hm.\n</think>\n\n{content}"
    deltas = [d for i in range(0, len(text), size) for d in parser.feed(text[i : i + size])]
    deltas += parser.finish()
    assert "".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) == "Hm."
    assert "".join(d.text for d in deltas if isinstance(d, ContentDelta)) == content


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_where_content_would_have_a_form(size: int) -> None:
    parser = ReplyParser([READ], thinking_open=False, new_call_id=lambda: "call", has_form=True)
    text = f"{CALL}\n{CALL}"
    deltas = [d for i in range(0, len(text), size) for d in parser.feed(text[i : i + size])]
    deltas += parser.finish()
    assert [type(delta) for delta in deltas] == [ToolCallDelta, ToolCallDelta]
