"""Where a prompt parts from an earlier one: the token, the message, the text, and who changed it.

Owns the reading of two timelines side by side; which earlier one is prompt_history's business,
what it cost is not known here. Pure functions; any thread.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from daemon.text.prompt import Prompt, PromptFrame
from daemon.text.prompt_history import FrameShape, Nearest, Tokens
from daemon.text.tokenizer import Tokenizer
from daemon.text.tool_calls import CLOSING, OPENING, parse_call

Part = Literal["tools", "system", "content", "thinking", "tool_call", "tool_result", "message"]

Change = Literal[
    "system_changed",
    "tools_changed",
    "compaction",
    "template_rerendering",
    "tool_call_reserialised",
    "client_edit",
    "never_seen",
]

RESULT_START, RESULT_END = "<tool_response>\n", "\n</tool_response>"
SNIPPET_CHARACTERS = 160
_SNIPPET_TOKENS = 64
_COMPACTED_SHARE = 0.5
"""A history that shrank below this share of what it was has been summarised."""

_THINKING = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_CALL = re.compile(f"{OPENING}.*?(?:{CLOSING}|\\Z)", re.DOTALL)
_TOOL_NAME = re.compile(r'"name": ?"([^"]*)"')


class Difference(Struct, frozen=True, kw_only=True):
    """The first token in which a prompt differs from an earlier timeline, and the text around it.

    `message` is the index of the client's message, None in the tools; a part "message" is one that
    was put in or left out. `tool` names the tool whose definition differs. `shared` is what both
    say just before, `before` how the earlier one goes on, `after` how this one does. `cut`: a
    tool's result came back shorter, and so many characters of its beginning are as they were.
    """

    position: int
    message: int | None
    role: str
    part: Part
    tool: str | None
    change: Change
    shared: str
    before: str
    after: str
    cut: int | None = None


class _Frames(Struct, frozen=True):
    """The frame that differs, in both timelines: its text, and where in it they part."""

    kind: str
    before: str
    after: str
    offset: int


def find_difference(
    tokenizer: Tokenizer, shape: FrameShape, prompt: Prompt, nearest: Nearest, session: str
) -> Difference | None:
    """None where nothing that the client sent before has changed: the prompt goes on from the
    earlier one, repeats it, or branches off at its end. None too where the earlier one is another
    model's, whose vocabulary may be another."""
    position = nearest.num_common
    past = nearest.past
    if position in (len(past.tokens), len(prompt.tokens)) or not prompt.frames or past.model:
        return None
    frame = _frame_at(prompt.frames, position)
    if _is_branch(shape, nearest, frame):
        return None
    frames = _frames(tokenizer, shape, prompt, past.tokens, position)
    part, change = _judge(frames)
    if change == "client_edit" and frame.kind in ("user", "assistant"):
        change = _whole_change(prompt, nearest, session)
    return Difference(
        position=position,
        message=_message(frame, frames, part),
        role="tool" if part == "tool_result" else _role(frame),
        part=part,
        tool=_tool_name(frames) if part == "tools" else None,
        change=change,
        shared=tokenizer.decode(prompt.tokens[max(0, position - _SNIPPET_TOKENS) : position])[
            -SNIPPET_CHARACTERS:
        ],
        before=_snippet(tokenizer, past.tokens.tolist(), position),
        after=_snippet(tokenizer, prompt.tokens, position),
        cut=_cut(frames) if part == "tool_result" else None,
    )


def _frame_at(frames: Sequence[PromptFrame], position: int) -> PromptFrame:
    return frames[bisect_right(frames, position, key=lambda frame: frame.start) - 1]


def _is_branch(shape: FrameShape, nearest: Nearest, frame: PromptFrame) -> bool:
    """Whether the prompts part behind all that the client had sent the first time."""
    past = nearest.past
    starts = shape.starts(past.tokens[: past.num_prompt])
    if past.state == "stored" or not starts:
        return False
    return nearest.num_common >= starts[-1] and frame.kind != "assistant"


def _frames(
    tokenizer: Tokenizer, shape: FrameShape, prompt: Prompt, past: Tokens, position: int
) -> _Frames:
    starts = [frame.start for frame in prompt.frames]
    at = bisect_right(starts, position) - 1
    stop = starts[at + 1] if at + 1 < len(starts) else len(prompt.tokens)
    begin = starts[at]
    past_stop = next((s for s in shape.starts(past) if s > position), len(past))
    return _Frames(
        kind=prompt.frames[at].kind,
        before=tokenizer.decode(past[begin:past_stop].tolist()),
        after=tokenizer.decode(prompt.tokens[begin:stop]),
        offset=len(tokenizer.decode(prompt.tokens[begin:position])),
    )


def _judge(frames: _Frames) -> tuple[Part, Change]:
    role_end = frames.after.find("\n") + 1
    if frames.offset < role_end and frames.kind != "system":
        return "message", "client_edit"
    match frames.kind:
        case "system":
            return ("tools", "tools_changed") if _in_tools(frames) else ("system", "system_changed")
        case "assistant":
            return _judge_reply(frames)
        case "tool":
            return "tool_result", "client_edit"
    return "content", "client_edit"


def _cut(frames: _Frames) -> int | None:
    """How much of a tool's result is left where it came back shorter, in characters."""
    start = frames.after.rfind(RESULT_START, 0, frames.offset) + len(RESULT_START)
    place = max(frames.offset - 1, 0)
    before, after = (text.find(RESULT_END, place) for text in (frames.before, frames.after))
    is_shorter = start >= len(RESULT_START) and 0 <= after < before
    return frames.offset - start if is_shorter else None


def _in_tools(frames: _Frames) -> bool:
    """Whether the list of tools differs, which templates write into the system prompt."""
    ends = [text.find("</tools>") for text in (frames.before, frames.after)]
    if min(ends) < 0:
        return max(ends) >= 0
    return frames.offset < max(ends)


def _judge_reply(frames: _Frames) -> tuple[Part, Change]:
    """Whether a reply came back saying the same in other tokens, and in which part it differs."""
    before, after = _Reply.read(frames.before), _Reply.read(frames.after)
    same_rest = (before.content, before.calls) == (after.content, after.calls)
    if _is_inside(_THINKING, frames):
        is_template = same_rest and (before.thinking == after.thinking or not after.thinking)
        return "thinking", "template_rerendering" if is_template else "client_edit"
    is_same = same_rest and before.thinking == after.thinking
    if before.calls and OPENING in frames.after[: frames.offset + len(OPENING)]:
        return "tool_call", "tool_call_reserialised" if is_same else "client_edit"
    return "content", "template_rerendering" if is_same else "client_edit"


class _Reply(Struct, frozen=True):
    """What a reply says, whatever the spelling."""

    thinking: str
    content: str
    calls: tuple[Any, ...]

    @classmethod
    def read(cls, text: str) -> "_Reply":
        thinking = "".join(_THINKING.findall(text)).strip()
        rest = _THINKING.sub("", text)
        calls = tuple(_canonical(call) for call in _CALL.findall(rest))
        content = _CALL.sub("", rest).partition("\n")[2]
        return cls(thinking, content.removesuffix("<|im_end|>\n").strip(), calls)


def _canonical(call: str) -> Any:
    """A call by its meaning: name and arguments, in any order; as it is when it is none."""
    parsed = parse_call(call, {})
    if parsed is None:
        return call
    return parsed.name, {key: _stripped(value) for key, value in parsed.arguments.items()}


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _is_inside(pattern: re.Pattern[str], frames: _Frames) -> bool:
    """Whether the texts part inside what the pattern finds, or where only one of them has it."""
    return any(
        found.start() <= frames.offset <= found.end()
        for text in (frames.before, frames.after)
        for found in pattern.finditer(text)
    )


def _whole_change(prompt: Prompt, nearest: Nearest, session: str) -> Change:
    """An edit of one message, or a history that was replaced, or another conversation."""
    num_known = len(prompt.tokens) - nearest.num_common - nearest.num_new
    if len(prompt.tokens) < _COMPACTED_SHARE * nearest.past.num_prompt and (
        nearest.past.session == session
    ):
        return "compaction"
    is_other = nearest.past.session != session and num_known < nearest.num_new
    return "never_seen" if is_other else "client_edit"


def _message(frame: PromptFrame, frames: _Frames, part: Part) -> int | None:
    if part == "tools" or not frame.messages:
        return None
    if frame.kind != "tool":
        return frame.messages.start
    opened = frames.after.count("<tool_response>", 0, frames.offset)
    return min(frame.messages.start + max(opened - 1, 0), frame.messages.stop - 1)


def _role(frame: PromptFrame) -> str:
    return "assistant" if frame.kind == "generation" else frame.kind


def _tool_name(frames: _Frames) -> str | None:
    """The tool on whose line the texts part, as this prompt has it, or else the earlier one."""
    for text in (frames.after, frames.before):
        start = text.rfind("\n", 0, frames.offset) + 1
        end = text.find("\n", frames.offset)
        if found := _TOOL_NAME.search(text[start : end if end >= 0 else len(text)]):
            return found[1]
    return None


def _snippet(tokenizer: Tokenizer, tokens: Sequence[int], position: int) -> str:
    text = tokenizer.decode(tokens[position : position + _SNIPPET_TOKENS])
    return text[:SNIPPET_CHARACTERS]
