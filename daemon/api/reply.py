"""One reply as it grows: sampled tokens in, deltas of reasoning, content and tool calls out.

Owns decoding, parsing and stop strings of one reply. Knows no engine and no dialect; event loop.
"""

import uuid
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from msgspec import Struct

from daemon.api.stop_strings import StopStrings
from daemon.engine.requests import SamplingParams
from daemon.text.messages import ToolSpec
from daemon.text.prompt import Prompt
from daemon.text.replay import Cut
from daemon.text.reply_grammar import Guide
from daemon.text.reply_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ReplyParser,
    ToolCallDelta,
)
from daemon.text.tokenizer import Tokenizer
from daemon.text.tool_calls import CLOSING


class ReplyRules(Struct, frozen=True, kw_only=True):
    """How to answer.

    `max_tokens` None is all that the context leaves, 0 only keeps the prompt. `forbid_calls` keeps
    the tools in the prompt, whose prefix stays the same, and bans the token that opens a call.
    `single_call` ends the reply after its first tool call. `guide` is the form that it must have,
    and `thinking_budget` the tokens after which its thinking is ended. `stop_tokens` end it beside
    the model's own. With `plain` it is text: neither reasoning nor calls are looked for.
    `report_progress` makes pieces of the prompt's progress.
    """

    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    forbid_calls: bool = False
    single_call: bool = False
    guide: Guide | None = None
    thinking_budget: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    plain: bool = False
    report_progress: bool = False


class Parser(Protocol):
    """Text in pieces → deltas."""

    def feed(self, text: str) -> list[Delta]:
        """What became certain with this piece."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back."""
        ...


class PlainText:
    """A parser that looks for nothing."""

    def feed(self, text: str) -> list[Delta]:
        """The text itself."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """Nothing was held back."""
        return []


class Reply:
    """Feeds tokens through decoder, parser and stop strings.

    Stop strings are looked for in the content alone: one that occurs in reasoning or in a tool
    call would end an answer that the client has not seen.

    Attributes:
        num_tokens: sampled tokens that belong to the reply.
        num_reasoning_tokens: those of them that think, with the one that closes the thinking.
        num_calls: tool calls given out.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, tools: Sequence[ToolSpec], rules: ReplyRules
    ) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_calls = 0
        self._decoder = tokenizer.decoder()
        self._parser: Parser = (
            PlainText()
            if rules.plain
            else ReplyParser(
                tools,
                thinking_open=prompt.thinking_open,
                new_call_id=_new_call_id,
                has_form=rules.guide is not None and rules.guide.content is not None,
            )
        )
        self._thinking = prompt.thinking_open
        self._think_tags = (tokenizer.encode("<think>"), tokenizer.encode("</think>"))
        self._stop = StopStrings(rules.stop)
        self._single_call = rules.single_call
        self._is_cut = False

    @property
    def is_cut(self) -> bool:
        """Whether the reply ended before the model said so; further tokens are ignored."""
        return self._is_cut

    @property
    def stop(self) -> str:
        """The stop string that ended the reply, or ""."""
        return self._stop.found

    @property
    def cut(self) -> Cut | None:
        """Where in the last token's text the reply ended, if it was cut."""
        if not self._is_cut:
            return None
        return Cut(self.stop, keeps_mark=False) if self.stop else Cut(CLOSING, keeps_mark=True)

    def feed(self, token: int) -> list[Delta]:
        """The deltas that `token` makes certain; may be none."""
        if self._is_cut:
            return []
        self.num_tokens += 1
        self._count_reasoning(token)
        return self._pass(self._parser.feed(self._decoder.feed(token)))

    def finish(self) -> list[Delta]:
        """What was held back, once no token can follow."""
        if self._is_cut:
            return []
        deltas = self._pass(self._parser.feed(self._decoder.finish()))
        deltas += self._pass(self._parser.finish())
        if not self._is_cut and (rest := self._stop.finish()):
            deltas.append(ContentDelta(rest))
        return deltas

    def _count_reasoning(self, token: int) -> None:
        opening, closing = self._think_tags
        self.num_reasoning_tokens += self._thinking
        if [token] in (opening, closing):
            self._thinking = [token] == opening

    def _pass(self, deltas: Sequence[Delta]) -> list[Delta]:
        passed: list[Delta] = []
        for delta in deltas:
            if self._is_cut:
                break
            match delta:
                case ContentDelta(text):
                    passed += self._content(text)
                case ToolCallDelta():
                    passed += self._call(delta)
                case ReasoningDelta():
                    passed.append(delta)
        return passed

    def _content(self, text: str) -> list[Delta]:
        certain = self._stop.feed(text)
        self._is_cut = bool(self._stop.found)
        return [ContentDelta(certain)] if certain else []

    def _call(self, call: ToolCallDelta) -> list[Delta]:
        held = self._stop.finish()
        self.num_calls += 1
        self._is_cut = self._single_call
        return [ContentDelta(held), call] if held else [call]


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The same deltas, neighbours of one kind put together."""
    out: list[Delta] = []
    for kind, run in groupby(deltas, type):
        if kind is ToolCallDelta:
            out += run
        else:
            text = "".join(delta.text for delta in run if not isinstance(delta, ToolCallDelta))
            out.append(ContentDelta(text) if kind is ContentDelta else ReasoningDelta(text))
    return out


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
