from collections.abc import Sequence

import pytest
from conversations import conversations
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import InvalidRequest
from daemon.text.messages import Message, ToolCall, ToolSpec
from daemon.text.prompt import Prompt, PromptBuilder
from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer

TOOL = ToolSpec("read", {}, {"type": "function", "function": {"name": "read"}})


class Memory(dict[str, tuple[int, ...]]):
    """Remembered replies, for ever."""

    def recall(self, frame_text: str) -> tuple[int, ...] | None:
        return self.get(frame_text)


def message(role: str, content: str, **others: object) -> Message:
    return Message(role=role, content=content, **others)  # type: ignore[arg-type]


CALL = ToolCall("1", "read", {"p": "a"})
LOOP = [
    message("system", "Be brief."),
    message("user", "Read a."),
    message(
        "assistant", "", reasoning="One file.", tool_calls=(ToolCall("1", "read", {"p": "a"}),)
    ),
    message("tool", "A", tool_call_id="1"),
    message("assistant", "Done."),
    message("user", "Thanks."),
]


@given(messages=conversations, with_tools=st.booleans())
def test_frame_by_frame_equals_the_whole(
    qwen: Tokenizer, template: ChatTemplate, messages: list[Message], with_tools: bool
) -> None:
    tools = [TOOL] * with_tools
    prompt = PromptBuilder(qwen, template, Memory()).build(messages, tools)
    segments = [s for frame in template.render(messages, tools) for s in frame.segments]
    if not any(segment.literal for segment in segments):
        assert list(prompt.tokens) == qwen.encode("".join(s.text for s in segments))
    by_segment = [t for s in segments for t in qwen.encode(s.text, special=not s.literal)]
    assert list(prompt.tokens) == by_segment


@given(messages=conversations)
def test_boundaries_lie_between_frames(
    tiny: Tokenizer, template: ChatTemplate, messages: list[Message]
) -> None:
    prompt = PromptBuilder(tiny, template, Memory()).build(messages)
    start = tiny.control_tokens["<|im_start|>"]
    positions = [position for position, _ in prompt.boundaries]
    assert positions == sorted(set(positions))
    assert all(0 < position < len(prompt.tokens) for position in positions)
    inside = {reason for p, reason in prompt.boundaries if prompt.tokens[p] != start}
    assert inside <= {"tool", "section", "head"}, "several tools' results in one, and long ones"
    assert prompt.boundaries[-1] == (len(prompt.tokens) - len(prompt.generation), "prompt")


def test_boundaries_of_an_agent_loop(qwen: Tokenizer, template: ChatTemplate) -> None:
    prompt = PromptBuilder(qwen, template, Memory()).build(LOOP, [TOOL])
    frames = _frames(qwen, prompt)
    reasons = dict(prompt.boundaries)
    assert [reasons.get(start) for start in frames] == [
        *(None, "system", None, "tool", None, "user", "prompt")
    ]


def test_each_of_several_tools_results_has_a_boundary(
    qwen: Tokenizer, template: ChatTemplate
) -> None:
    results = [message("tool", f"result {number}: " + "word " * 40) for number in range(3)]
    history = [message("user", "look"), message("assistant", "I look."), *results]
    prompt = PromptBuilder(qwen, template, Memory()).build(history)
    places = [position for position, reason in prompt.boundaries if reason == "tool"]
    assert len(places) == 3
    for place, number in zip(places[1:], (1, 2), strict=True):
        rest = qwen.decode(prompt.tokens[place:])
        assert rest.find(f"result {number}") < 20
        assert f"result {number}" not in qwen.decode(prompt.tokens[:place])


def test_sections_are_paragraphs_and_tools_one_a_page(
    qwen: Tokenizer, template: ChatTemplate
) -> None:
    tools = [
        ToolSpec(f"tool_{n}", {}, {"type": "function", "about": f"{n}: " + "word " * 90})
        for n in range(4)
    ]
    rules = "\n\n".join(f"# Rule {n}\n- " + "word " * 30 for n in range(8))
    history = [message("system", rules), message("user", "look\n\n" + "word " * 70 + "\n\nthen")]
    prompt = PromptBuilder(qwen, template, Memory()).build(history, tools)
    places = [position for position, reason in prompt.boundaries if reason == "section"]
    pages = [position // 64 for position in places]
    assert pages == sorted(set(pages))
    rest = [qwen.decode(prompt.tokens[place:]) for place in places]
    assert sum(text.startswith('{"type"') for text in rest) == 3, "the first is in the first page"
    assert sum(text.startswith("# Rule") for text in rest) > 3
    assert rest[-1].startswith("then<|im_end|>")


def test_each_page_in_the_head_of_a_tools_result_is_a_place(
    qwen: Tokenizer, template: ChatTemplate
) -> None:
    history = [message("user", "look"), message("assistant", "I look.")]
    for content in ("long " * 3000, "short " * 100):
        history.append(message("tool", content))
    prompt = PromptBuilder(qwen, template, Memory()).build(history)
    first, second = [position for position, reason in prompt.boundaries if reason == "tool"]
    end = prompt.boundaries[-1][0]
    places = [position for position, reason in prompt.boundaries if reason == "head"]
    expected = [*range(64, first + 1025, 64)]
    assert [p for p in places if p < second] == [p for p in expected if p > first]
    assert [p for p in places if p > second] == [p for p in range(0, end + 1, 64) if p > second]


def test_no_boundary_at_the_very_start(qwen: Tokenizer, template: ChatTemplate) -> None:
    prompt = PromptBuilder(qwen, template, Memory()).build([message("user", "hi")])
    assert [reason for _, reason in prompt.boundaries] == ["prompt"]


def test_generation_prompts(qwen: Tokenizer, template: ChatTemplate) -> None:
    builder = PromptBuilder(qwen, template, Memory())
    thinking = builder.build(LOOP)
    answering = builder.build(LOOP, (), {"enable_thinking": False})
    assert (thinking.thinking_open, answering.thinking_open) == (True, False)
    assert thinking.generation == (248045, 74455, 198, 248068, 198)
    assert answering.generation == (248045, 74455, 198, 248068, 271, 248069, 271)
    assert answering.tokens[-7:] == answering.generation


def test_typed_control_tokens_are_ordinary_tokens(qwen: Tokenizer, template: ChatTemplate) -> None:
    prompt = PromptBuilder(qwen, template, Memory()).build([message("user", "a<|im_end|>b")])
    assert prompt.tokens.count(248046) == 1
    assert "a<|im_end|>b" in qwen.decode(prompt.tokens)


def test_no_messages_are_refused(tiny: Tokenizer, template: ChatTemplate) -> None:
    with pytest.raises(InvalidRequest) as raised:
        PromptBuilder(tiny, template, Memory()).build([])
    assert raised.value.param == "messages"


class CountingTokenizer:
    """Counts the characters that are encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_characters = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.num_characters += len(text)
        return self._tokenizer.encode(text, special=special)

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)


def test_history_is_encoded_once(tiny: Tokenizer, template: ChatTemplate) -> None:
    counting = CountingTokenizer(tiny)
    builder = PromptBuilder(counting, template, Memory())  # type: ignore[arg-type]
    history = [message("user", "x" * 5000), message("assistant", "y" * 5000, reasoning="z")]
    builder.build(history)
    counting.num_characters = 0
    builder.build([*history, message("tool", "more", tool_call_id="1")])
    assert counting.num_characters < 100


def split_oddly(tokenizer: Tokenizer, text: str) -> list[int]:
    """A split that encoding never chooses: letter by letter outside the tags."""
    tags = ("<think>", "</think>", "\n\n", "<tool_call>", "</tool_call>")
    tokens: list[int] = []
    while text:
        tag = next((tag for tag in tags if text.startswith(tag)), text[0])
        tokens += tokenizer.encode(tag)
        text = text.removeprefix(tag)
    return tokens


REPLY = "One file.\n</think>\n\nReading it now."
ANSWER = message("assistant", "Reading it now.", reasoning="One file.")


def build_after(
    tokenizer: Tokenizer, template: ChatTemplate, reply: Sequence[int], *later: Message
) -> tuple[Prompt, Prompt]:
    memory = Memory()
    builder = PromptBuilder(tokenizer, template, memory)
    before = builder.build(LOOP[:2])
    memory |= dict(builder.replay_entries(before, reply))
    return before, builder.build([*LOOP[:2], *later])


def test_a_reply_that_comes_back_keeps_its_tokens(qwen: Tokenizer, template: ChatTemplate) -> None:
    reply = split_oddly(qwen, REPLY)
    assert reply != qwen.encode(REPLY)
    result = message("tool", "A", tool_call_id="1")
    before, after = build_after(qwen, template, [*reply, 248046], ANSWER, result)
    kept = (*before.tokens, *reply, 248046, 198)
    assert after.tokens[: len(kept)] == kept


def test_a_reply_keeps_its_tokens_without_its_thinking(
    qwen: Tokenizer, template: ChatTemplate
) -> None:
    reply = split_oddly(qwen, REPLY)
    before, after = build_after(qwen, template, reply, ANSWER, message("user", "Thanks."))
    stable = len(before.tokens) - 2
    answer = split_oddly(qwen, "Reading it now.")
    kept = (*before.tokens[:stable], *answer, 248046, 198)
    assert after.tokens[: len(kept)] == kept


def test_an_edited_reply_is_encoded_anew(qwen: Tokenizer, template: ChatTemplate) -> None:
    reply = split_oddly(qwen, REPLY)
    edited = message("assistant", "Reading it later.", reasoning="One file.")
    _, after = build_after(qwen, template, reply, edited)
    _, fresh = build_after(qwen, template, [], edited)
    assert after.tokens == fresh.tokens


@pytest.mark.parametrize("forged", ["<|im_end|>\n<|im_start|>", "another text"])
def test_a_memory_that_does_not_fit_is_not_used(
    qwen: Tokenizer, template: ChatTemplate, forged: str
) -> None:
    said = message("assistant", "<|im_end|>\n<|im_start|>")
    messages = [message("user", "q"), said, message("user", "r")]
    text = template.render(messages)[1].text
    fooled = Memory({text: (248045, 74455, 198, *qwen.encode(forged), 248046, 198)})
    fooled_prompt = PromptBuilder(qwen, template, fooled).build(messages)
    assert fooled_prompt == PromptBuilder(qwen, template, Memory()).build(messages)


def _frames(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    start = tokenizer.control_tokens["<|im_start|>"]
    return [i for i, token in enumerate(prompt.tokens) if token == start]
