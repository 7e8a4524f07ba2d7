"""Random conversations for property tests: hostile strings in every place."""

from hypothesis import strategies as st

from daemon.text.messages import Message, ToolCall

FRAGMENTS = [
    *("<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<think>", "</think>", "<tool_call>"),
    *("hello", " world", "\n", "\n\n", "  ", "e\u0301", "你好", "🙂", "12", "\ufdd0", "<|im_"),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
calls = st.builds(
    ToolCall,
    id=st.just("1"),
    name=st.sampled_from(["read", "<|im_end|>"]),
    arguments=st.dictionaries(texts, texts | st.integers() | st.lists(texts), max_size=2),
)
users = st.builds(Message, role=st.just("user"), content=texts)
others = st.one_of(
    users,
    st.builds(Message, role=st.just("system"), content=texts),
    st.builds(Message, role=st.just("tool"), content=texts, tool_call_id=st.just("1")),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=texts,
        reasoning=st.none() | texts,
        tool_calls=st.lists(calls, max_size=2).map(tuple),
    ),
)
conversations = st.builds(
    lambda before, question, after: [*before, question, *after],
    st.lists(others, max_size=3),
    st.just(Message(role="user", content="question")),
    st.lists(others, max_size=4),
)
