"""However a reply is cut into deltas and pieces, its stream says the same as its whole answer."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay_requests import READERS, Answered
from daemon.api.anthropic_messages_response import PING, MessageWriter
from daemon.api.cache_plan import CachePlan, Restored
from daemon.api.openai_chat_response import ChatWriter, Head
from daemon.api.openai_responses_request import ResponsesRequest
from daemon.api.openai_responses_response import response_object
from daemon.api.openai_responses_stream import ResponseWriter
from daemon.api.openai_responses_tools import ToolNames
from daemon.api.reply_pieces import Outcome, Piece, PromptProgress
from daemon.text.reply_parser import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

PLAN = CachePlan(
    request="r", session="s", status="ended", created=0, prompt_tokens=9, restored=Restored(3),
    evaluated_tokens=6, new_tokens=6, lost_tokens=0, prompt_s=0, lost_s=0, cause=None, summary="",
    nearest=None, difference=None,
)  # fmt: skip
OUTCOME = Outcome(
    reason="stop", stop="", num_prompt_tokens=9, num_cached_tokens=3, num_written_tokens=2,
    num_reply_tokens=5, num_reasoning_tokens=1, prompt_ms=1, decode_ms=1, plan=PLAN,
)  # fmt: skip
BEGUN = Piece((), (), PromptProgress(
    num_prompt_tokens=9, num_cached_tokens=3, num_done_tokens=3, elapsed_ms=1,
))  # fmt: skip

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
deltas = st.lists(
    st.one_of(
        words.map(ReasoningDelta),
        words.map(ContentDelta),
        st.dictionaries(words, words, max_size=2).map(
            lambda given: ToolCallDelta("call_1", "f", json.dumps(given), 0)
        ),
    ),
    max_size=12,
)


def chat() -> Any:
    return ChatWriter(Head("id", 0, "m", "f"), None, include_usage=True)  # type: ignore[arg-type]


def messages() -> Any:
    return MessageWriter("msg_1", "m", 9)


def responses() -> Any:
    asked = ResponsesRequest(input="hello")
    response = response_object("resp_1", 0, "m", asked, temperature=1, top_p=1)
    return ResponseWriter(
        response, ToolNames({}), summarises=True, seals=True, on_end=lambda done: None
    )


WRITERS = {"/v1/chat/completions": chat, "/v1/messages": messages, "/v1/responses": responses}


@pytest.mark.parametrize("path", WRITERS)
@given(deltas=deltas, sizes=st.lists(st.integers(0, 4), max_size=12))
def test_pieces_of_any_size(path: str, deltas: list[Delta], sizes: list[int]) -> None:
    writer = WRITERS[path]()
    pieces = [BEGUN, *cut(deltas, sizes)]
    stream = writer.begin() + b"".join(map(writer.piece, pieces)) + writer.end(OUTCOME)
    kind = {"content-type": "text/event-stream"}
    found = READERS[path](httpx.Response(200, content=stream, headers=kind))
    assert found == Answered(
        "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)),
        "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)),
        [(d.name, json.loads(d.arguments)) for d in deltas if isinstance(d, ToolCallDelta)],
    )
    assert answered_whole(path, WRITERS[path]().whole(pieces, OUTCOME)) == found


def cut(deltas: Sequence[Delta], sizes: Sequence[int]) -> list[Piece]:
    """Pieces of those sizes, a sign of life where it is 0; the rest in one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(Piece(tuple(deltas[at : at + size])))
        at += size
    return [*pieces, Piece(tuple(deltas[at:]))] if at < len(deltas) else pieces


def answered_whole(path: str, body: bytes) -> Answered:
    """What an answer in one piece says."""
    answer = json.loads(body)
    if path == "/v1/chat/completions":
        return READERS[path](httpx.Response(200, content=body, headers={"content-type": "json"}))
    if path == "/v1/responses":
        event = b'data: {"response": ' + body + b"}\n"
        return READERS[path](httpx.Response(200, content=event))
    blocks = answer["content"]
    return Answered(
        "".join(block.get("thinking", "") for block in blocks),
        "".join(block.get("text", "") for block in blocks),
        [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"],
    )


@pytest.mark.parametrize("path", WRITERS)
def test_our_own_mistake_ends_a_stream_without_its_text(path: str) -> None:
    last = WRITERS[path]().error(ZeroDivisionError("secret"))
    assert last.endswith(b"\n\n")
    assert b"secret" not in last
    assert b"its log says more" in last


def test_thinking_that_is_not_shown_gives_signs_of_life() -> None:
    now = [0.0]
    writer = MessageWriter("msg_1", "m", 9, shows_thinking=False, clock=lambda: now[0])
    thought = Piece((ReasoningDelta("x"),))
    assert b"content_block_start" in writer.piece(BEGUN) + writer.piece(thought)
    assert writer.piece(thought) == b""
    now[0] += 2.5
    assert writer.piece(thought) == PING
    assert writer.piece(thought) == b""
    assert b"signature_delta" in writer.end(OUTCOME)
