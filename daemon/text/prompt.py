"""Messages → the prompt's token ids and the positions where a checkpoint has meaning.

Joins template, tokenizer and remembered replies. Knows nothing of the engine or the store; its
reasons are spelled as the engine's. A PromptBuilder is safe on any thread.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, dropwhile, pairwise
from typing import Any, Literal

from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS
from daemon.errors import InvalidRequest
from daemon.text.cuts import CutMemory, Cuts, UnsavedCuts
from daemon.text.encoded_frames import EncodedFrames
from daemon.text.messages import Message, ToolSpec
from daemon.text.normalisers import SAFE, Conversation, Normaliser
from daemon.text.replay import (
    ReplayEntry,
    SampledTokens,
    frame_form,
    is_faithful,
    replay_entries,
    says_the_same,
)
from daemon.text.reply_key import digests, reply_key
from daemon.text.sections import section_starts
from daemon.text.template import ChatTemplate, Frame, FrameKind
from daemon.text.tokenizer import Tokenizer

MAX_SHARED = 8
"""Frames with several tools' results in which each one's place is looked for, the last ones."""

HEAD_TOKENS = 1024
"""Clients that shorten an old tool result leave at most so much of its beginning."""

BoundaryReason = Literal["system", "user", "tool", "prompt", "mark", "section", "head"]


class PromptFrame(Struct, frozen=True):
    """Where a frame's tokens begin, and the indices of the messages that it shows."""

    start: int
    kind: FrameKind
    messages: range


class Prompt(Struct, frozen=True, kw_only=True):
    """What to generate from.

    `boundaries` are (position, reason) in rising order, one a position and none at 0: "system" is
    the end of system prompt and tools, "user" the start of a user message, "tool" of tool results
    and where clients have cut such, "prompt" the start of the generation prompt, "mark" where a
    client marked a message, "section" the first paragraph or tool definition to begin in a page, in
    what system and user say, "head" each page in the beginning of a tool's result. `generation` are
    the generation prompt's tokens, the last of `tokens`; with `thinking_open` it ends inside
    `<think>`. `frames` say which tokens show which messages, and `said` is a digest of what these
    say. `normalised` names the rules that changed the conversation.
    """

    tokens: tuple[int, ...]
    boundaries: tuple[tuple[int, BoundaryReason], ...]
    generation: tuple[int, ...]
    thinking_open: bool
    frames: tuple[PromptFrame, ...] = ()
    said: str = ""
    normalised: tuple[str, ...] = ()


class _History:
    """The conversation that frames show, for those who need more than their text."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> None:
        self.messages = messages
        self.tools = tools
        self.digests = tuple(digests(messages))


class PromptBuilder:
    """Builds prompts frame by frame; equal to encoding the whole text at once.

    Args:
        sampled: the exact tokens of earlier replies.
        normaliser: what is taken out of conversations before they are rendered; None: what is
            safe.
        cuts: where clients were seen to cut results; None: nothing is known yet.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampled: SampledTokens,
        normaliser: Normaliser | None = None,
        cuts: CutMemory | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._sampled = sampled
        self._normaliser = normaliser or Normaliser(SAFE)
        self._encoded = EncodedFrames()
        self._cuts = Cuts(cuts or UnsavedCuts())

    def build(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render and encode a conversation.

        Args:
            options: variables for the template, such as `enable_thinking`.

        Raises:
            InvalidRequest: no messages, or the template refuses them.
        """
        if not messages:
            raise InvalidRequest("At least one message is needed.", "messages")
        given, fired = self._normaliser.apply(Conversation(tuple(messages), tuple(tools)))
        messages, tools = given.messages, given.tools
        frames = self._template.render(messages, tools, options)
        history = _History(messages, tools)
        tokens: list[int] = []
        starts = []
        for frame in frames:
            starts.append(len(tokens))
            tokens.extend(self._encode(frame, history))
        return Prompt(
            tokens=tuple(tokens),
            boundaries=_boundaries(
                frames,
                starts,
                self._marks(frames, starts, messages),
                chain(
                    self._inner_results(frames, starts, messages),
                    self._likely_cuts(frames, starts, messages),
                ),
                self._sections(frames, starts, tokens),
            ),
            generation=tuple(tokens[starts[-1] :]),
            thinking_open=_is_thinking_open(frames[-1].text),
            frames=tuple(
                PromptFrame(start, frame.kind, frame.messages)
                for frame, start in zip(frames, starts, strict=True)
            ),
            said=history.digests[-1],
            normalised=fired,
        )

    def learn_cut(self, cut: int) -> bool:
        """A client left so many characters of a tool's result; whether that is new, and prompts
        built from now on have boundaries there."""
        return self._cuts.learn(cut)

    def forget(self) -> None:
        """Forget the frames that were encoded, since somebody wants a text to be gone."""
        self._encoded.clear()

    def replay_entries(
        self, prompt: Prompt, reply_tokens: Sequence[int], tools: Sequence[ToolSpec] = ()
    ) -> list[ReplayEntry]:
        """What to remember when a reply to `prompt` ends: (text or key, exact tokens) pairs."""
        return replay_entries(self._tokenizer, prompt.generation, reply_tokens, tools, prompt.said)

    def _marks(
        self, frames: Sequence[Frame], starts: Sequence[int], messages: Sequence[Message]
    ) -> Iterator[int]:
        """Positions of the clients' marks; those inside a frame may be one token early."""
        for frame, start, end in zip(frames, starts, starts[1:], strict=False):
            for index in frame.messages:
                content = messages[index].content
                for mark in messages[index].marks:
                    if mark == len(content) and index == frame.messages[-1]:
                        yield end
                    else:
                        yield from self._position(frame, start, content, mark)

    def _inner_results(
        self, frames: Sequence[Frame], starts: Sequence[int], messages: Sequence[Message]
    ) -> Iterator[int]:
        """Where the further results of the last frames begin that show several tools' results."""
        shared = [pair for pair in zip(frames, starts, strict=True) if len(pair[0].messages) > 1]
        for frame, start in [pair for pair in shared if pair[0].kind == "tool"][-MAX_SHARED:]:
            for index in frame.messages[1:]:
                yield from self._position(frame, start, messages[index].content, 0)

    def _likely_cuts(
        self, frames: Sequence[Frame], starts: Sequence[int], messages: Sequence[Message]
    ) -> Iterator[int]:
        """Where each tool's result will be cut, if it is cut where others were."""
        cuts = self._cuts.known
        shown = zip(frames, starts, strict=True) if cuts else ()
        for frame, start in shown:
            for index in frame.messages if frame.kind == "tool" else ():
                content = messages[index].content.strip()
                for cut in cuts:
                    if cut < len(content):
                        yield from self._position(frame, start, content, cut)

    def _sections(
        self, frames: Sequence[Frame], starts: Sequence[int], tokens: Sequence[int]
    ) -> Iterator[int]:
        """The first section to begin in each page, in frames of system and user."""
        last_page = 0
        for frame, start, end in zip(frames, starts, starts[1:], strict=False):
            if frame.kind != "system" and frame.kind != "user":
                continue
            for offset in self._section_starts(frame, tokens[start:end]):
                page = (start + offset) // PAGE_TOKENS
                if page > last_page:
                    yield start + offset
                    last_page = page

    def _section_starts(self, frame: Frame, tokens: Sequence[int]) -> Sequence[int]:
        def search() -> Iterable[int]:
            pieces = map(self._tokenizer.token_bytes, tokens)
            return section_starts(pieces, with_definitions=frame.kind == "system")

        return self._encoded.get_or_encode(("sections", frame.segments), search)

    def _position(self, frame: Frame, start: int, content: str, mark: int) -> Iterator[int]:
        """Where a mark in a content lies, if the frame shows that. The last token before it may be
        another one in the whole text, so it is left out."""
        text = _text_before(frame.text, content, mark)
        if text is not None:
            tokens = self._encoded.get_or_encode(text, lambda: self._tokenizer.encode(text))
            yield start + max(0, len(tokens) - 1)

    def _encode(self, frame: Frame, history: _History) -> Sequence[int]:
        if frame.kind != "assistant" or not frame.messages:
            return self._encoded.get_or_encode(frame.segments, lambda: self._encode_segments(frame))
        sampled = self._sampled.recall(frame.text)
        respelled = None if sampled else self._recall_said(frame, history)

        def encode() -> Iterable[int]:
            canonical = self._encode_segments(frame)
            if sampled and is_faithful(self._tokenizer, frame.text, canonical, sampled):
                return sampled
            if respelled and self._says_the_same(frame, history, canonical, respelled):
                return respelled
            return canonical

        return self._encoded.get_or_encode((frame.segments, sampled or respelled), encode)

    def _recall_said(self, frame: Frame, history: _History) -> tuple[int, ...] | None:
        """What was sampled for a reply that comes back in another spelling."""
        index, form = frame.messages[0], frame_form(frame.text)
        if form is None:
            return None
        key = reply_key(history.messages[index], form, history.digests[index])
        return self._sampled.recall(key)

    def _says_the_same(
        self, frame: Frame, history: _History, canonical: Sequence[int], sampled: Sequence[int]
    ) -> bool:
        message, form = history.messages[frame.messages[0]], frame_form(frame.text)
        assert form is not None
        return says_the_same(self._tokenizer, message, form, canonical, sampled, history.tools)

    def _encode_segments(self, frame: Frame) -> list[int]:
        return [
            token
            for segment in frame.segments
            for token in self._tokenizer.encode(segment.text, special=not segment.literal)
        ]


def _text_before(frame: str, content: str, mark: int) -> str | None:
    """A frame's text up to a mark in the content that it shows, or None where it shows another."""
    shown = content.strip()
    at = frame.find(shown)
    if at < 0 or not shown:
        return None
    num_stripped = len(content) - len(content.lstrip())
    return frame[: at + min(max(0, mark - num_stripped), len(shown))]


def _boundaries(
    frames: Sequence[Frame],
    starts: Sequence[int],
    marks: Iterable[int],
    inner_results: Iterable[int],
    sections: Iterable[int],
) -> tuple[tuple[int, BoundaryReason], ...]:
    after_system = next(
        dropwhile(lambda pair: pair[0].kind == "system", zip(frames, starts, strict=True))
    )
    reasons: dict[int, BoundaryReason] = dict.fromkeys(sections, "section")
    reasons |= dict.fromkeys(inner_results, "tool")
    reasons |= dict.fromkeys(marks, "mark")
    for frame, start in zip(frames, starts, strict=True):
        if frame.kind == "user" or frame.kind == "tool":
            reasons[start] = frame.kind
    reasons |= {after_system[1]: "system", starts[-1]: "prompt"}
    reasons.pop(0, None)
    heads: dict[int, BoundaryReason] = dict.fromkeys(_heads(reasons), "head")
    return tuple(sorted((heads | reasons).items()))


def _heads(reasons: Mapping[int, BoundaryReason]) -> Iterator[int]:
    """The pages that end in the first tokens of a tool's result, or of what follows a cut in it."""
    meant = sorted(position for position, reason in reasons.items() if reason != "section")
    for start, following in pairwise(meant):
        if reasons[start] == "tool":
            first = start // PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS
            yield from range(first, min(start + HEAD_TOKENS, following) + 1, PAGE_TOKENS)


def _is_thinking_open(generation: str) -> bool:
    return generation.rfind("<think>") > generation.rfind("</think>")
