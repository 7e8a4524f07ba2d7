"""A reply that comes back in another spelling keeps the tokens that were sampled."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from fakes import RememberedReplies
from hypothesis import given
from hypothesis import strategies as st
from template_sources import OFFICIAL_STYLE

from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.next_prompt import next_beginning
from daemon.text.prompt import Prompt, PromptBuilder
from daemon.text.reply_key import digests, reply_key
from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "line": {"type": "integer"},
        "share": {"type": "number"},
        "force": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string"}},
    },
}
TOOL = ToolSpec("edit", SCHEMA, {"type": "function", "function": {"name": "edit"}})
USER = Message(role="user", content="Change it.")
RESULT = Message(role="tool", content="done", tool_call_id="1")
ARGUMENTS = {"path": "a.py", "line": 3, "share": 1.0, "force": True, "names": ["x", "y"]}
SAMPLED = """Think twice.
</think>

I shall.

<tool_call>
<function=edit>
<parameter=force>
true
</parameter>
<parameter=names>
["x","y"]
</parameter>
<parameter=path>
a.py
</parameter>
<parameter=line>
3
</parameter>
<parameter=share>
1.0
</parameter>
</function>
</tool_call>"""


def call(arguments: dict[str, Any]) -> tuple[ToolCall, ...]:
    return (ToolCall("1", "edit", arguments),)


def echo(**changes: Any) -> Message:
    message = Message(
        role="assistant",
        content="I shall.",
        reasoning="Think twice.",
        tool_calls=call(ARGUMENTS),
    )
    return msgspec.structs.replace(message, **changes)


def builder(qwen: Tokenizer, replies: RememberedReplies) -> PromptBuilder:
    return PromptBuilder(qwen, ChatTemplate(OFFICIAL_STYLE, qwen.control_tokens), replies)


@pytest.fixture
def remembered(qwen: Tokenizer) -> tuple[PromptBuilder, Prompt, list[int]]:
    replies = RememberedReplies()
    prompts = builder(qwen, replies)
    prompt = prompts.build([USER], [TOOL])
    sampled = qwen.encode(SAMPLED)
    replies.remember(prompts.replay_entries(prompt, sampled, [TOOL]))
    return prompts, prompt, sampled


Remembered = tuple[PromptBuilder, Prompt, list[int]]


def goes_on(prompt: Prompt, sampled: Sequence[int], following: Prompt) -> bool:
    known = (*prompt.tokens, *sampled)
    return following.tokens[: len(known)] == known


@pytest.mark.parametrize(
    "message",
    [
        echo(),
        echo(reasoning=None),
        echo(reasoning="\nThink twice.  "),
        echo(content="I shall.\n"),
        echo(tool_calls=call(dict(reversed(ARGUMENTS.items())))),
        echo(tool_calls=call({**ARGUMENTS, "share": 1, "force": "true", "line": "3"})),
        echo(tool_calls=call(json.loads(json.dumps(ARGUMENTS, indent=2)))),
    ],
)
def test_another_spelling_maps_back_to_what_was_sampled(
    remembered: Remembered, message: Message
) -> None:
    prompts, prompt, sampled = remembered
    assert goes_on(prompt, sampled, prompts.build([USER, message, RESULT], [TOOL]))


@pytest.mark.parametrize(
    "message",
    [
        echo(content="I shall not."),
        echo(reasoning="Think once."),
        echo(tool_calls=call({**ARGUMENTS, "path": "b.py"})),
        echo(tool_calls=call({**ARGUMENTS, "force": False})),
        echo(tool_calls=call({**ARGUMENTS, "names": ["y", "x"]})),
        echo(tool_calls=call({**ARGUMENTS, "more": 1})),
        echo(tool_calls=call(ARGUMENTS) * 2),
        echo(tool_calls=()),
    ],
)
def test_what_a_client_changed_is_shown_as_the_client_says(
    qwen: Tokenizer, remembered: Remembered, message: Message
) -> None:
    prompts, prompt, sampled = remembered
    following = prompts.build([USER, message, RESULT], [TOOL])
    assert not goes_on(prompt, sampled, following)
    plain = builder(qwen, RememberedReplies())
    assert following.tokens == plain.build([USER, message, RESULT], [TOOL]).tokens


def test_thinking_is_brought_back_only_after_the_same_conversation(
    qwen: Tokenizer, remembered: Remembered
) -> None:
    prompts, _, _ = remembered
    other, silent = Message(role="user", content="Change that."), echo(reasoning=None)
    assert "Think twice" in qwen.decode(prompts.build([USER, silent, RESULT], [TOOL]).tokens)
    assert "Think twice" not in qwen.decode(prompts.build([other, silent, RESULT], [TOOL]).tokens)


def test_behind_a_new_question_the_sampled_spelling_stays_without_its_thinking(
    qwen: Tokenizer, remembered: Remembered
) -> None:
    prompts, _, _ = remembered
    history = [USER, echo(reasoning=None, tool_calls=call(ARGUMENTS)), RESULT]
    text = qwen.decode(prompts.build([*history, USER], [TOOL]).tokens)
    assert SAMPLED.partition("</think>\n\n")[2] in text
    assert "Think twice" not in text


@pytest.mark.parametrize("reasoning", ["Think twice.", None])
def test_history_is_append_only_where_a_template_keeps_past_thinking(
    remembered: Remembered, reasoning: str | None
) -> None:
    prompts, prompt, sampled = remembered
    history = [USER, echo(reasoning=reasoning), RESULT]
    keep = {"preserve_thinking": True}
    asked = prompts.build([*history, USER], [TOOL], keep)
    assert goes_on(prompt, sampled, asked)
    answer = Message(role="assistant", content="Yes.", reasoning="Sure.")
    beginning = next_beginning(prompts, [*history, USER], [TOOL], keep, answer)
    following = prompts.build([*history, USER, answer, USER], [TOOL], keep)
    assert beginning.tokens[: len(asked.tokens)] == asked.tokens
    assert following.tokens[: len(beginning.tokens)] == beginning.tokens


def test_a_memory_that_says_something_else_is_not_used(qwen: Tokenizer) -> None:
    """A store that gives back the wrong record must not put words into the model's mouth."""
    replies = RememberedReplies()
    prompts = builder(qwen, replies)
    plain = prompts.build([USER, echo(), RESULT], [TOOL])
    digest = list(digests([USER]))[-1]
    wrong = qwen.encode("<|im_start|>assistant\n<think>\nNo.\n</think>\n\nNo.<|im_end|>\n")
    replies.entries[reply_key(echo(), "full", digest)] = tuple(wrong)
    assert prompts.build([USER, echo(), RESULT], [TOOL]).tokens == plain.tokens


values = st.recursive(
    st.booleans() | st.integers(-99, 99) | st.text(max_size=5) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(arguments=st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_json_and_order_never_change_a_key(arguments: dict[str, Any]) -> None:
    again = json.loads(json.dumps(dict(reversed(arguments.items())), indent=1))
    one, other = echo(tool_calls=call(arguments)), echo(tool_calls=call(again))
    assert reply_key(one, "bare", "") == reply_key(other, "bare", "")
