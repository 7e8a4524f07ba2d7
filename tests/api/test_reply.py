"""One reply: any split of its text into tokens gives the same deltas; stop strings never leak."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.api.reply import Reply, ReplyRules, joined
from daemon.api.stop_strings import StopStrings
from daemon.engine.requests import SamplingParams
from daemon.text.prompt import Prompt
from daemon.text.reply_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ReplyParser,
    ToolCallDelta,
)
from daemon.text.tokenizer import Tokenizer

PROMPT = Prompt(tokens=(1,), boundaries=(), generation=(1,), thinking_open=True)
PIECES = st.sampled_from(
    ["word", " ", "\n", "</think>", "<think>", "STOP", "ST", "é", "🙂", "<tool_call>\n", "x"]
    + ["<function=f>\n", "<parameter=a>\n", "1", "\n</parameter>\n</function>\n</tool_call>"]
)


def read(tokenizer: Tokenizer, tokens: list[int], **rules: object) -> list[Delta]:
    reply = Reply(tokenizer, PROMPT, (), ReplyRules(sampling=SamplingParams(), **rules))  # type: ignore[arg-type]
    deltas = [delta for token in tokens for delta in reply.feed(token)]
    return [without_id(delta) for delta in joined(deltas + reply.finish())]


def without_id(delta: Delta) -> Delta:
    if isinstance(delta, ToolCallDelta):
        return ToolCallDelta("", delta.name, delta.arguments, delta.index)
    return delta


def split_into_tokens(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[int]:
    """A split that the tokenizer need not choose; tags that are one token stay so or are cut."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = (text[a:b] for a, b in zip(places, places[1:], strict=False))
    return [token for piece in pieces for token in tokenizer.encode(piece)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(PIECES, max_size=20).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    stop=st.sampled_from([(), ("STOP",), ("STO", "TOP"), ("🙂", "word x")]),
)
def test_how_a_text_is_cut_changes_nothing(
    tokenizer: Tokenizer, text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    cut = read(tokenizer, split_into_tokens(tokenizer, text, cuts), stop=stop)
    assert cut == read(tokenizer, tokenizer.encode(text), stop=stop)


BYTES = st.one_of(PIECES.map(str.encode), st.binary(max_size=3))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(BYTES, max_size=20), stop=st.sampled_from([(), ("STOP",), ("é", "\ufffd")]))
def test_any_bytes_one_by_one_or_at_once(
    tokenizer: Tokenizer, pieces: list[bytes], stop: tuple[str, ...]
) -> None:
    """Bytes that are no text too: each is a token of its own, or all are read as one."""
    stream = b"".join(pieces)
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.num_real_tokens)}
    tokens = [single[bytes([byte])] for byte in stream]
    decoded = stream.decode("utf-8", "replace")
    at_once = ReplyParser((), thinking_open=True, new_call_id=lambda: "")
    found = StopStrings(stop)
    expected: list[Delta] = []
    for delta in at_once.feed(decoded) + at_once.finish():
        if isinstance(delta, ContentDelta) and not found.found:
            expected += [ContentDelta(text)] if (text := found.feed(delta.text)) else []
        elif not found.found:
            held = found.finish() if isinstance(delta, ToolCallDelta) else ""
            expected += [*([ContentDelta(held)] if held else []), without_id(delta)]
    if not found.found and (rest := found.finish()):
        expected.append(ContentDelta(rest))
    assert read(tokenizer, tokens, stop=stop) == joined(expected)


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_the_first_is_complete(pieces: list[str], stops: list[str]) -> None:
    search = StopStrings(stops)
    passed = "".join(map(search.feed, pieces)) + search.finish()
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert passed == (text[: min(ends)[1]] if ends else text)
    assert bool(search.found) == bool(ends)


def test_reasoning_is_counted_with_its_closing_token(tokenizer: Tokenizer) -> None:
    reply = Reply(tokenizer, PROMPT, (), ReplyRules(sampling=SamplingParams()))
    for token in tokenizer.encode("One two.\n</think>\n\nAnswer."):
        reply.feed(token)
    assert reply.num_reasoning_tokens == len(tokenizer.encode("One two.\n</think>"))
    assert reply.num_tokens == len(tokenizer.encode("One two.\n</think>\n\nAnswer."))


def test_joined_puts_neighbours_together() -> None:
    call = ToolCallDelta("i", "f", "{}", 0)
    deltas: list[Delta] = [ReasoningDelta("a"), ReasoningDelta("b"), ContentDelta("c"), call]
    assert joined([*deltas, ContentDelta("d"), ContentDelta("e")]) == [
        ReasoningDelta("ab"),
        ContentDelta("c"),
        call,
        ContentDelta("de"),
    ]
