"""Every way in which clients change what they sent before, by the part and cause that it is told
as. Prompts are built as for an answer; the earlier one has the reply that was sampled for it."""

from typing import Any

import msgspec
import pytest
from conversations import conversations, texts
from hypothesis import given
from hypothesis import strategies as st

from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.prompt import Prompt, PromptBuilder
from daemon.text.prompt_difference import Difference, find_difference
from daemon.text.prompt_history import FrameShape, PastPrompt, PromptHistory
from daemon.text.template import FRAME_END, FRAME_START, ChatTemplate
from daemon.text.tokenizer import Tokenizer

LINES = "".join(f"line {number} of the file\n" for number in range(60))


class Nothing:
    """Remembers no replies."""

    def recall(self, frame_text: str) -> None:
        return None


def tool(name: str, description: str = "Does it.") -> ToolSpec:
    function = {"name": name, "description": description, "parameters": {"type": "object"}}
    return ToolSpec(name, {}, {"type": "function", "function": function})


TOOLS = [tool("read"), tool("search"), tool("write")]
SYSTEM = Message(role="system", content="Be careful. Today is Monday. Be brief.")
ASK = Message(role="user", content="What is in a.py and in b.py?")
CALLS = Message(
    role="assistant",
    content="I read both.",
    reasoning="Two files.",
    tool_calls=(ToolCall("1", "read", {"path": "a.py", "limit": 5}), ToolCall("2", "read", {})),
)
RESULT = Message(role="tool", content=LINES, tool_call_id="1")
OTHER_RESULT = Message(role="tool", content="nothing here", tool_call_id="2")
ANSWER = Message(role="assistant", content="Lines.", reasoning="It is clear.")
NEXT = Message(role="user", content="Thanks. Now write c.py.")
LOOP = [SYSTEM, ASK, CALLS, RESULT, OTHER_RESULT]


def but(message: Message, **changes: Any) -> Message:
    return msgspec.structs.replace(message, **changes)


class Eyes:
    """Builds prompts and says where one parts from another."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.builder = PromptBuilder(tokenizer, template, Nothing())
        start = tokenizer.control_tokens[FRAME_START]
        self.shape = FrameShape(start, tuple(tokenizer.encode(FRAME_END)))

    def build(self, messages: list[Message], tools: list[ToolSpec] | None = None) -> Prompt:
        return self.builder.build(messages, TOOLS if tools is None else tools)

    def compare(
        self, earlier: Prompt, prompt: Prompt, reply: str = "", session: str = "s"
    ) -> Difference | None:
        history = PromptHistory(self.shape)
        history.add(
            PastPrompt(
                id="earlier",
                session="s",
                tokens=history.tokens(earlier.tokens),
                num_prompt=len(earlier.tokens),
                began_s=0.0,
            )
        )
        history.end("earlier", self.tokenizer.encode(reply), "ended", len(earlier.tokens))
        nearest = history.nearest(prompt.tokens, session)
        assert nearest is not None
        return find_difference(self.tokenizer, self.shape, prompt, nearest, session)


@pytest.fixture(scope="module")
def eyes(tiny: Tokenizer, official: ChatTemplate) -> Eyes:
    return Eyes(tiny, official)


@given(earlier=conversations, messages=conversations, reply=texts, cut=st.floats(0, 1))
def test_any_two_conversations(
    eyes: Eyes, earlier: list[Message], messages: list[Message], reply: str, cut: float
) -> None:
    """Whatever clients write: the tokens before the place are equal, those at it are not."""
    shared = earlier[: int(cut * len(earlier))]
    first, second = eyes.build(earlier), eyes.build([*shared, *messages])
    difference = eyes.compare(first, second, reply)
    if difference is not None:
        position = difference.position
        timeline = (*first.tokens, *eyes.tokenizer.encode(reply))
        assert second.tokens[:position] == timeline[:position]
        assert second.tokens[position] != timeline[position]
        message = difference.message
        assert message is None or 0 <= message < len(shared) + len(messages)
    else:
        size = min(len(first.tokens) - len(first.generation), len(second.tokens))
        assert second.tokens[:size] == first.tokens[:size]


def told(difference: Difference | None) -> tuple[str, str, int | None, str]:
    assert difference is not None
    return difference.change, difference.part, difference.message, difference.role


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [but(SYSTEM, content="Be careful. Today is Tuesday. Be brief."), *LOOP[1:]],
            ("system_changed", "system", 0, "system"),
        ),
        (
            [SYSTEM, but(ASK, content="What is in a.py?"), *LOOP[2:]],
            ("client_edit", "content", 1, "user"),
        ),
        (
            [SYSTEM, ASK, but(CALLS, reasoning="Two other files."), *LOOP[3:]],
            ("client_edit", "thinking", 2, "assistant"),
        ),
        (
            [SYSTEM, ASK, but(CALLS, content="I read all."), *LOOP[3:]],
            ("client_edit", "content", 2, "assistant"),
        ),
        (
            [*LOOP[:3], but(RESULT, content=LINES[:300] + "[cut]"), OTHER_RESULT],
            ("client_edit", "tool_result", 3, "tool"),
        ),
        (
            [*LOOP[:4], but(OTHER_RESULT, content="something")],
            ("client_edit", "tool_result", 4, "tool"),
        ),
        (
            [SYSTEM, ASK, but(CALLS, tool_calls=(CALLS.tool_calls[0],)), RESULT],
            ("client_edit", "tool_call", 2, "assistant"),
        ),
        ([SYSTEM, ASK, NEXT, *LOOP[2:]], ("client_edit", "message", 2, "user")),
        ([*LOOP, ANSWER, NEXT], ("template_rerendering", "thinking", 2, "assistant")),
    ],
)
def test_what_changed(
    eyes: Eyes, messages: list[Message], expected: tuple[str, str, int, str]
) -> None:
    earlier = eyes.build(LOOP)
    assert told(eyes.compare(earlier, eyes.build(messages))) == expected


def test_the_text_around_the_change(eyes: Eyes) -> None:
    changed = but(SYSTEM, content="Be careful. Today is Tuesday. Be brief.")
    difference = eyes.compare(eyes.build(LOOP), eyes.build([changed, *LOOP[1:]]))
    assert difference is not None
    assert "Today is" in difference.shared
    assert "Monday. Be brief." in difference.before
    assert "Tuesday. Be brief." in difference.after
    assert max(map(len, (difference.shared, difference.before, difference.after))) <= 160


@pytest.mark.parametrize(
    ("tools", "name"),
    [
        ([TOOLS[0], tool("search", "Finds text."), TOOLS[2]], "search"),
        (TOOLS[:2], "write"),
        ([*TOOLS, tool("run")], "run"),
        ([], "read"),
    ],
)
def test_tools(eyes: Eyes, tools: list[ToolSpec], name: str) -> None:
    difference = eyes.compare(eyes.build(LOOP), eyes.build(LOOP, tools))
    assert told(difference) == ("tools_changed", "tools", None, "system")
    assert difference is not None
    if tools:
        assert difference.tool == name


def test_a_call_with_its_arguments_in_another_order(eyes: Eyes) -> None:
    call = ToolCall("1", "read", {"limit": 5, "path": "a.py"})
    again = but(CALLS, tool_calls=(call, CALLS.tool_calls[1]))
    difference = eyes.compare(eyes.build(LOOP), eyes.build([SYSTEM, ASK, again, *LOOP[3:]]))
    assert told(difference) == ("tool_call_reserialised", "tool_call", 2, "assistant")


def test_a_sampled_reply_that_comes_back_without_its_thinking(eyes: Eyes) -> None:
    difference = eyes.compare(
        eyes.build(LOOP),
        eyes.build([*LOOP, ANSWER, NEXT]),
        "It is clear.\n</think>\n\nLines.",
    )
    assert told(difference)[0] == "template_rerendering"


def test_what_goes_on_repeats_or_branches_off_differs_in_nothing(eyes: Eyes) -> None:
    earlier = eyes.build(LOOP)
    reply = "It is clear.\n</think>\n\nLines."
    assert eyes.compare(earlier, earlier, reply) is None
    assert eyes.compare(earlier, eyes.build([*LOOP, ANSWER]), reply) is None
    branch = eyes.build([SYSTEM, ASK, Message(role="user", content="And a title?")])
    assert eyes.compare(eyes.build([SYSTEM, ASK]), branch, reply) is None


def test_a_summary_in_place_of_the_history(eyes: Eyes) -> None:
    long = [*LOOP, *[RESULT] * 5]
    summary = Message(role="user", content="So far: a.py has lines.")
    difference = eyes.compare(eyes.build(long), eyes.build([SYSTEM, summary]))
    assert told(difference) == ("compaction", "content", 1, "user")


def test_another_conversation_of_the_same_agent(eyes: Eyes) -> None:
    other = [but(SYSTEM), Message(role="user", content="How do I leave this editor? " * 30)]
    difference = eyes.compare(eyes.build([SYSTEM, ASK]), eyes.build(other), session="t")
    assert told(difference) == ("never_seen", "content", 1, "user")


def test_where_a_result_was_cut_is_a_boundary_in_all_others(eyes: Eyes) -> None:
    texts = ["".join(f"{n} {word} here\n" for n in range(200)) for word in ("one", "two", "three")]
    results = [but(RESULT, content=text) for text in texts]
    history = [SYSTEM, ASK, CALLS, results[0], ANSWER, NEXT, CALLS, *results[1:]]
    earlier = eyes.build(history)
    history[3] = but(RESULT, content=texts[0][:900] + "\n[cut]")
    difference = eyes.compare(earlier, eyes.build(history))
    assert difference is not None
    assert difference.cut is not None
    assert 890 <= difference.cut <= 900
    assert eyes.builder.learn_cut(difference.cut)
    assert not eyes.builder.learn_cut(difference.cut)
    prompt = eyes.build(history)
    places = [position for position, reason in prompt.boundaries if reason == "tool"]
    shown = [eyes.tokenizer.decode(prompt.tokens[:place]) for place in places]
    for text in texts[1:]:
        assert any(s.endswith(text[:880]) or text[:880] in s[-900:] for s in shown)


def test_a_result_that_is_another_was_not_cut(eyes: Eyes) -> None:
    earlier = eyes.build(LOOP)
    longer = eyes.compare(earlier, eyes.build([*LOOP[:3], but(RESULT, content=LINES + "more")]))
    assert longer is not None
    assert longer.cut is None
