"""A streamed reply's text → reasoning, content and tool calls.

Owns the tags of a reply and the newlines that belong to them. Knows nothing of tokens or of any
API's wire format. A ReplyParser belongs to one reply; how its text was cut into pieces never
changes what comes out.
"""

import json
import re
from collections.abc import Callable, Sequence
from enum import Enum, auto

from msgspec import Struct

from daemon.text.messages import ToolSpec
from daemon.text.tool_calls import CLOSING, OPENING, ParsedCall, scan_call

THINK_END = "</think>"
CALL = r"<tool_call>\s*<function="
LATER_CALL = re.compile(rf"(?<=\n){CALL}")
FIRST_CALL = re.compile(rf"(?:\A|(?<=\n)){CALL}")
LATER_TAG = re.compile(rf"(?<=\n)<think>|{CALL}")
FIRST_TAG = re.compile(rf"(?:\A\s*|(?<=\n))<think>|{CALL}")


def _beginning(tag: str) -> str:
    """A pattern for every non-empty beginning of `tag`."""
    *others, last = map(re.escape, tag)
    pattern = f"{last}?"
    for letter in reversed(others[1:]):
        pattern = f"(?:{letter}{pattern})?"
    return others[0] + pattern


UNFINISHED_TAG = re.compile(
    rf"(?:{_beginning('<think>')}|{_beginning(THINK_END)}|{_beginning(OPENING)}"
    rf"|{OPENING}\s*(?:{_beginning('<function=')})?)\Z"
)


class ReasoningDelta(Struct, frozen=True, tag=True):
    """More of the thinking."""

    text: str


class ContentDelta(Struct, frozen=True, tag=True):
    """More of the answer."""

    text: str


class ToolCallDelta(Struct, frozen=True, tag=True):
    """A whole call. `arguments` is a JSON object; `index` counts the reply's calls from 0."""

    id: str
    name: str
    arguments: str
    index: int


Delta = ReasoningDelta | ContentDelta | ToolCallDelta


class Mode(Enum):
    """What the text at hand belongs to."""

    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class ReplyParser:
    """Reads a reply as the chat template would write it again.

    The newline before `</think>`, the two after it and those around calls are the template's and
    belong to no delta. A malformed call is content. `<think>` opens reasoning on a line of its
    own; within a line it is a mention. A call that ends a reply whose thinking was never closed
    is a call. Content that `has_form` is what it is, whatever it spells, unless it begins with a
    call.

    Args:
        thinking_open: the generation prompt ended inside `<think>`.
        new_call_id: gives an id that no other call has.
    """

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        *,
        thinking_open: bool,
        new_call_id: Callable[[], str],
        has_form: bool = False,
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._new_call_id = new_call_id
        self._has_form = has_form
        self._mode = Mode.REASONING if thinking_open else Mode.CONTENT
        self._buffer = ""
        self._deltas: list[Delta] = []
        self._newlines_to_skip = 0
        self._at_start = True  # of a run of reasoning or content
        self._has_content = False
        self._num_calls = 0
        self._gap = ""
        self._scanned = 0

    def feed(self, text: str) -> list[Delta]:
        """What became certain with this piece."""
        self._buffer += text
        return self._read(final=False)

    def finish(self) -> list[Delta]:
        """What was held back, now that the reply has ended."""
        return self._read(final=True)

    def _read(self, final: bool) -> list[Delta]:
        readers = {
            Mode.REASONING: self._read_reasoning,
            Mode.CONTENT: self._read_content,
            Mode.CALL: self._read_call,
        }
        while readers[self._mode](final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read_reasoning(self, final: bool) -> bool:
        """Consume reasoning; whether the mode changed. So for the two below."""
        self._skip_newlines()
        text, closed, rest = self._buffer.partition(THINK_END)
        if closed:
            self._emit_reasoning(text.removesuffix("\n"))
            self._begin_content(rest, newlines_to_skip=2)
            return True
        calls = FIRST_CALL if self._at_start else LATER_CALL
        if final and (start := self._last_words(calls)) is not None:
            self._emit_reasoning(self._buffer[:start].rstrip("\n"))
            self._begin_content(self._buffer[start:], newlines_to_skip=0)
            return True
        cut = len(self._buffer) if final else self._held_from(calls.search(self._buffer))
        self._emit_reasoning(self._take(cut))
        return False

    def _read_content(self, final: bool) -> bool:
        self._skip_newlines()
        if self._has_form and not self._num_calls and not self._may_begin_a_call():
            self._emit_content(self._take(len(self._buffer)))
            return False
        tag = (FIRST_TAG if self._at_start else LATER_TAG).search(self._buffer)
        cut = len(self._buffer) if final and not tag else self._held_from(tag)
        if not self._at_start or self._buffer[:cut].strip():
            self._emit_content(self._take(cut))
        if tag:
            self._open(tag[0])
        return tag is not None

    def _may_begin_a_call(self) -> bool:
        head = self._buffer[: len(OPENING)]
        return not self._has_content and OPENING.startswith(head)

    def _read_call(self, final: bool) -> bool:
        scan = scan_call(self._buffer, self._scanned, self._tools, final)
        if scan.status == "open":
            self._scanned = scan.stop
            return False
        if scan.call:
            self._emit_call(scan.call)
            self._begin_content(self._buffer[scan.stop :], newlines_to_skip=0)
        else:
            self._mode = Mode.CONTENT
            self._buffer = self._buffer[len(OPENING) :]
            self._emit_content(self._gap + OPENING)
        return True

    def _open(self, tag: str) -> None:
        """Enter what `tag` opens; the whitespace before it is at the head of the buffer."""
        self._gap, _, rest = self._buffer.partition("<")
        if tag.endswith("<think>"):
            self._mode = Mode.REASONING
            self._buffer = rest.removeprefix("think>")
            self._newlines_to_skip = 1
            self._at_start = True
        else:
            self._mode = Mode.CALL
            self._buffer = f"<{rest}"
            self._scanned = 0

    def _begin_content(self, rest: str, newlines_to_skip: int) -> None:
        self._mode = Mode.CONTENT
        self._buffer = rest
        self._newlines_to_skip = newlines_to_skip
        self._at_start = True

    def _held_from(self, tag: re.Match[str] | None) -> int:
        """Where in the buffer a tag, or what may become one, begins; newlines before it too."""
        tag = tag or UNFINISHED_TAG.search(self._buffer)
        return len(self._buffer[: tag.start() if tag else None].rstrip("\n"))

    def _skip_newlines(self) -> None:
        while self._newlines_to_skip and self._buffer:
            if self._take_if("\n"):
                self._newlines_to_skip -= 1
            else:
                self._newlines_to_skip = 0

    def _last_words(self, calls: re.Pattern[str]) -> int | None:
        """Where the call begins that ends the reply, if one does."""
        if not self._buffer.rstrip().endswith(CLOSING):
            return None
        starts = (found.start() for found in calls.finditer(self._buffer))
        return next((start for start in starts if self._is_call(self._buffer[start:])), None)

    def _is_call(self, text: str) -> bool:
        return scan_call(text, 0, self._tools, final=True).status == "call"

    def _take_if(self, text: str) -> bool:
        present = self._buffer.startswith(text)
        self._buffer = self._buffer.removeprefix(text)
        return present

    def _take(self, size: int) -> str:
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text

    def _emit_reasoning(self, text: str) -> None:
        if text:
            self._at_start = False
            self._deltas.append(ReasoningDelta(text))

    def _emit_content(self, text: str) -> None:
        if self._num_calls and not self._has_content:
            text = text.lstrip("\n")
        if text:
            self._deltas.append(ContentDelta(text))
            self._has_content = True
            self._at_start = False

    def _emit_call(self, call: ParsedCall) -> None:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        self._deltas.append(
            ToolCallDelta(self._new_call_id(), call.name, arguments, self._num_calls)
        )
        self._num_calls += 1
