"""A reply as items and events of /v1/responses.

Owns the order of the events and the items as they grow. Pure but for a clock; event loop.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from daemon.api.openai_responses_items import CUSTOM_INPUT
from daemon.api.openai_responses_response import (
    CustomToolCallItem,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
    SummaryText,
    failure_of,
    usage_of,
)
from daemon.api.openai_responses_tools import ToolNames
from daemon.api.reply_pieces import Outcome, Piece
from daemon.api.sealed_reasoning import seal
from daemon.api.sse import frame
from daemon.text.reply_parser import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

OnEnd = Callable[[ResponseObject], None]
"""Gets the response that came to its end."""


class ResponseWriter:
    """Spells one reply.

    Args:
        response: as it begins; it grows with the reply.
        summarises: reasoning comes as a summary, else as content.
        seals: reasoning comes in a form to send back too.
        on_end: called before the last event is sent.
    """

    def __init__(
        self,
        response: ResponseObject,
        names: ToolNames,
        *,
        summarises: bool,
        seals: bool,
        on_end: OnEnd,
    ) -> None:
        self._response = response
        self._names = names
        self._summarises = summarises
        self._seals = seals
        self._on_end = on_end
        self._encoder = msgspec.json.Encoder()
        self._num_events = 0
        self._item: OutputItem | None = None
        self._text: list[str] = []

    def begin(self) -> bytes:
        """The response before there is anything in it; goes out at once."""
        return self._state("created") + self._state("in_progress")

    def piece(self, piece: Piece) -> bytes:
        """The piece's events; for a sign of life the state again, which clients count."""
        if not (piece.deltas or piece.tokens or piece.progress):
            return self._state("in_progress")
        return b"".join(event for delta in piece.deltas for event in self._delta(delta))

    def end(self, outcome: Outcome) -> bytes:
        """The events that close the last item, and the whole response."""
        events = b"".join(self._close(cut=outcome.reason == "length"))
        self._finish(outcome)
        return events + self._state(self._response.status)

    def error(self, error: Exception) -> bytes:
        """The last event of a response that broke off."""
        self._response.status = "failed"
        self._response.error = failure_of(error)
        return self._state("failed")

    def whole(self, pieces: Sequence[Piece], outcome: Outcome) -> bytes:
        """The response in one piece."""
        for piece in pieces:
            self.piece(piece)
        self.end(outcome)
        return self._encoder.encode(self._response)

    def _finish(self, outcome: Outcome) -> None:
        response = self._response
        response.status = "completed"
        if outcome.reason == "length":
            response.status = "incomplete"
            response.incomplete_details = {"reason": "max_output_tokens"}
        response.completed_at = int(time.time())
        response.usage = usage_of(outcome)
        self._on_end(response)

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        match delta:
            case ReasoningDelta(text):
                if not isinstance(self._item, ReasoningItem):
                    yield from self._close()
                    yield from self._open_reasoning()
                self._text.append(text)
                yield self._reasoning_event("delta", delta=text)
            case ContentDelta(text):
                if not isinstance(self._item, MessageItem):
                    yield from self._close()
                    yield from self._open_message()
                self._text.append(text)
                yield self._content_event("output_text.delta", delta=text, logprobs=[])
            case ToolCallDelta():
                yield from self._close()
                yield from self._call(delta)

    def _open_reasoning(self) -> Iterator[bytes]:
        yield self._open(ReasoningItem(id=self._item_id("rs")))
        if self._summarises:
            yield self._item_event(
                "reasoning_summary_part.added", summary_index=0, part=SummaryText("")
            )

    def _open_message(self) -> Iterator[bytes]:
        yield self._open(MessageItem(id=self._item_id("msg")))
        yield self._content_event("content_part.added", part=OutputText(""))

    def _call(self, call: ToolCallDelta) -> Iterator[bytes]:
        route = self._names.route(call.name)
        namespace = UNSET if route.namespace is None else route.namespace
        if route.kind == "custom":
            text = _free_text(call.arguments)
            custom = CustomToolCallItem(
                id=self._item_id("ctc"), call_id=call.id, name=route.name, namespace=namespace
            )
            yield self._open(custom)
            yield self._item_event("custom_tool_call_input.delta", delta=text)
            custom.input = text
            yield self._item_event("custom_tool_call_input.done", input=text)
        else:
            function = FunctionCallItem(
                id=self._item_id("fc"), call_id=call.id, name=route.name, namespace=namespace
            )
            yield self._open(function)
            yield self._item_event("function_call_arguments.delta", delta=call.arguments)
            function.arguments = call.arguments
            yield self._item_event(
                "function_call_arguments.done", arguments=call.arguments, name=route.name
            )
        yield from self._close()

    def _open(self, item: OutputItem) -> bytes:
        self._item = item
        self._response.output = [*self._response.output, item]
        return self._event("response.output_item.added", output_index=self._index, item=item)

    def _close(self, *, cut: bool = False) -> Iterator[bytes]:
        """Close the open item; `cut`: the reply ended in the middle of it."""
        item, self._item = self._item, None
        if item is None:
            return
        text = "".join(self._text)
        self._text.clear()
        item.status = "incomplete" if cut else "completed"
        if isinstance(item, ReasoningItem):
            yield from self._close_reasoning(item, text)
        elif isinstance(item, MessageItem):
            part = OutputText(text)
            item.content = [part]
            place = {"item_id": item.id, "output_index": self._index, "content_index": 0}
            yield self._event("response.output_text.done", text=text, logprobs=[], **place)
            yield self._event("response.content_part.done", part=part, **place)
        yield self._event("response.output_item.done", output_index=self._index, item=item)

    def _close_reasoning(self, item: ReasoningItem, text: str) -> Iterator[bytes]:
        place: dict[str, Any] = {"item_id": item.id, "output_index": self._index}
        if self._seals:
            item.encrypted_content = seal(text)
        if not self._summarises:
            item.content = [ReasoningText(text)]
            yield self._event("response.reasoning_text.done", content_index=0, text=text, **place)
            return
        part = SummaryText(text)
        item.summary = [part]
        place["summary_index"] = 0
        yield self._event("response.reasoning_summary_text.done", text=text, **place)
        yield self._event("response.reasoning_summary_part.done", part=part, **place)

    def _reasoning_event(self, kind: str, **fields: Any) -> bytes:
        if self._summarises:
            return self._item_event(f"reasoning_summary_text.{kind}", summary_index=0, **fields)
        return self._item_event(f"reasoning_text.{kind}", content_index=0, **fields)

    def _content_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None
        place = {"item_id": self._item.id, "output_index": self._index}
        return self._event(f"response.{kind}", **place, **fields)

    def _state(self, kind: str) -> bytes:
        return self._event(f"response.{kind}", response=self._response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        event = {"type": kind, "sequence_number": number, **fields}
        return frame(self._encoder.encode(event), kind.encode())

    @property
    def _index(self) -> int:
        return len(self._response.output) - 1

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._response.id.removeprefix('resp_')}{len(self._response.output)}"


def _free_text(arguments: str) -> str:
    """What a custom tool gets: the model was asked for one string, and may have erred."""
    given = msgspec.json.decode(arguments)
    text = given.get(CUSTOM_INPUT)
    return text if isinstance(text, str) and len(given) == 1 else arguments


def reply_text(response: ResponseObject) -> tuple[str, str]:
    """Reasoning and text of a response."""
    reasoning, content = "", ""
    for item in response.output:
        if isinstance(item, ReasoningItem):
            shown = item.content if item.content is not UNSET and item.content else item.summary
            reasoning += "".join(part.text for part in shown or ())
        elif isinstance(item, MessageItem):
            content += "".join(part.text for part in item.content)
    return reasoning, content
