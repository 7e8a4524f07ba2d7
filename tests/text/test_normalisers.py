"""Each rule takes out one kind of noise, and nothing where there is none."""

import json
import random
from typing import Any

import pytest
from fakes import RememberedReplies
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import ConfigError
from daemon.text.messages import Message, ToolSpec
from daemon.text.normalisers import (
    RULES,
    SAFE,
    Conversation,
    Normaliser,
    read_names,
    with_environment_last,
    with_schemas_in_order,
    without_billing_header,
    without_clock,
)
from daemon.text.prompt import PromptBuilder
from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer
from daemon.text.tool_order import MAX_ORDERS, ToolOrder

SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"description": "where", "type": "string"},
        "required": {"type": "array", "items": {"type": "integer"}, "default": {"b": 1, "a": 2}},
    },
    "required": ["path"],
}
QUESTION = Message(role="user", content="Go on.")


def system(content: str, *marks: int) -> Message:
    return Message(role="system", content=content, marks=marks)


def conversation(*messages: Message, tools: tuple[ToolSpec, ...] = ()) -> Conversation:
    return Conversation(messages, tools)


def tool(name: str = "read", parameters: dict[str, Any] | None = None) -> ToolSpec:
    parameters = SCHEMA if parameters is None else parameters
    function = {"name": name, "parameters": parameters}
    return ToolSpec(name, parameters, {"type": "function", "function": function})


def shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, list):
        return [shuffled(item, order) for item in value]
    if not isinstance(value, dict):
        return value
    keys = order.sample(list(value), len(value))
    return {key: shuffled(value[key], order) for key in keys}


@given(st.randoms(use_true_random=False))
def test_shuffled_schemas_are_written_alike(order: random.Random) -> None:
    plain = with_schemas_in_order(conversation(tools=(tool(),))).tools[0]
    data = {"b": 1, "a": 2}
    other = shuffled(SCHEMA, order)
    other["properties"]["required"]["default"] = data
    mixed = with_schemas_in_order(conversation(tools=(tool("read", other),))).tools[0]
    assert json.dumps(mixed.definition) == json.dumps(plain.definition)
    assert mixed.definition == tool().definition, "nothing is lost"
    assert '"default": {"b": 1, "a": 2}' in json.dumps(mixed.definition), "data keeps its order"


def test_the_billing_header_goes_and_marks_stay_where_they_were() -> None:
    header = "x-anthropic-billing-header: version=1; hash=abc;\n\n"
    given_ = conversation(system(f"{header}You help.\n\nMore.", 0, len(header) + 9), QUESTION)
    found = without_billing_header(given_)
    assert found.messages == (system("You help.\n\nMore.", 0, 9), QUESTION)
    assert without_billing_header(found) is found


def test_of_a_time_only_the_day_stays() -> None:
    text = "It is 2026-11-23T10:11:12.5Z; started 2026-11-22 09:00. Version 1.2:30 of 2026-11-01."
    found = without_clock(conversation(system(text), QUESTION))
    assert found.messages[0].content == (
        "It is 2026-11-23; started 2026-11-22. Version 1.2:30 of 2026-11-01."
    )
    user = conversation(system("Help."), Message(role="user", content=text))
    assert without_clock(user) is user


def test_the_environment_moves_before_the_newest_question() -> None:
    moving = "Today's date: Monday\nWorking directory: /w\ngit: M a.py\n<cwd>/w</cwd>"
    text = f"You help.\n{moving}\nBe brief."
    answer = Message(role="assistant", content="Done.")
    found = with_environment_last(conversation(system(text), QUESTION, answer, QUESTION, answer))
    first, *others = found.messages
    assert first.content == "You help.\nBe brief."
    assert others == [QUESTION, answer, system(moving), QUESTION, answer]


@pytest.mark.parametrize("messages", [(system("Help. The date matters."), QUESTION), (QUESTION,)])
def test_rules_leave_alone_what_has_no_noise(messages: tuple[Message, ...]) -> None:
    found, fired = Normaliser(tuple(RULES)).apply(conversation(*messages))
    assert (found.messages, fired) == (messages, ())


def test_rules_are_chosen_by_name() -> None:
    assert read_names("safe") == SAFE
    assert read_names("none") == ()
    assert read_names("clock, safe") == (*SAFE, "clock")
    assert read_names("all") == tuple(RULES)
    with pytest.raises(ConfigError, match="'clocks' is no rule"):
        read_names("clocks")


def test_a_prompt_names_the_rules_that_changed_it(tiny: Tokenizer, official: ChatTemplate) -> None:
    def build(*rules: str) -> tuple[tuple[str, ...], str]:
        builder = PromptBuilder(tiny, official, RememberedReplies(), Normaliser(rules))
        prompt = builder.build([system("Date: 2026-11-23 10:00"), QUESTION], [tool()])
        return prompt.normalised, tiny.decode(prompt.tokens)

    fired, text = build(*RULES)
    assert fired == ("schema-order", "clock")
    assert "10:00" not in text
    fired, text = build()
    assert fired == ()
    assert "10:00" in text


def test_tools_come_in_the_order_that_shares_most() -> None:
    order = ToolOrder()
    a, b, c, d = (tool(name) for name in "abcd")
    assert order.arrange([a, b, c]) == (a, b, c)
    assert order.arrange([d, b, a]) == (a, b, d)
    assert order.arrange([c, d]) == (c, d)
    assert order.arrange([b, a, d]) == (a, b, d)
    assert order.arrange([]) == ()
    assert order.arrange([a, a]) == (a, a)


def test_the_oldest_order_is_forgotten() -> None:
    order = ToolOrder()
    order.arrange([tool("x"), tool("y")])
    for number in range(MAX_ORDERS):
        order.arrange([tool(f"t{number}")])
    assert order.arrange([tool("y"), tool("x")]) == (tool("y"), tool("x"))
