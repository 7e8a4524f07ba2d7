"""What form a reply must have, and the Lark grammar that says so.

Owns the forms and their translation; call_grammar.py has the calls. Knows nothing of masks or of
thinking, which comes before. Pure; any thread.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llguidance.gbnf_to_lark import any_to_lark
from msgspec import Struct

from daemon.errors import InvalidRequest
from daemon.text.call_grammar import NEWLINE, CallRules, json_schema, quoted, regex
from daemon.text.messages import ToolSpec

CLIENTS_OWN = "client"
"""Name of the grammar that the client sent, whose rules have a space of their own."""


class ContentForm(Struct, frozen=True):
    """The form of a reply's content; `param` is what the client called it.

    `source` is a JSON schema, a regular expression, a list of strings, or a grammar in Lark or
    GBNF.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    source: Any
    param: str


class Guide(Struct, frozen=True, kw_only=True):
    """What a reply must be. With neither content nor calls to guide there is no Guide.

    Calls "free" follow no rule; "watched" ones keep to `tools` and their schemas if there are any;
    "required": the reply is nothing but calls of `tools`. `single_call`: of one.
    """

    content: ContentForm | None = None
    calls: Literal["free", "watched", "required"] = "free"
    tools: tuple[ToolSpec, ...] = ()
    single_call: bool = False


def grammar_of(guide: Guide, tags: tuple[int, int], loose: frozenset[str], after: str) -> str:
    """The grammar of a whole reply, after `after`, which the template puts before it.

    Args:
        tags: the ids of `<tool_call>` and `</tool_call>`.
        loose: tools whose arguments no grammar can express.

    Raises:
        InvalidRequest: says what makes no grammar.
    """
    bodies, rules, others = [], [], {}
    if guide.content is not None and guide.calls != "required":
        bodies.append("content")
        rules.append(f"content: {_content(guide.content)}")
        if guide.content.kind == "grammar":
            others[CLIENTS_OWN] = _lark(guide.content.source)
    if guide.calls == "required" or (guide.calls == "watched"):
        bodies.append("call" if guide.single_call else f"call ({quoted(NEWLINE)} call)*")
        rules.append(_call_rules(guide.tools, loose).text(*tags))
    before = f"{quoted(after)} " if after else ""
    return _together("\n".join((f"start: {before}({' | '.join(bodies)})", *rules)), others)


def one_call(tools: Sequence[ToolSpec], tags: tuple[int, int], loose: frozenset[str]) -> str:
    """The grammar of one call, where calls stand among free text."""
    return _together("start: call\n" + _call_rules(tools, loose).text(*tags), {})


def _together(lark: str, others: Mapping[str, str]) -> str:
    named = [{"name": name, "lark_grammar": text} for name, text in others.items()]
    return json.dumps({"grammars": [{"lark_grammar": lark}, *named]}, ensure_ascii=False)


def _call_rules(tools: Sequence[ToolSpec], loose: frozenset[str]) -> CallRules:
    rules = CallRules()
    for tool in tools:
        if tool.name in loose:
            rules.add_loose(tool)
        else:
            rules.add(tool)
    return rules


def _content(form: ContentForm) -> str:
    match form.kind:
        case "json":
            return f"%json {json_schema(form.source, lenient=False)}"
        case "regex":
            return regex(form.source)
        case "choice":
            return " | ".join(map(quoted, form.source))
        case "grammar":
            return f"@{CLIENTS_OWN}"


def _lark(source: str) -> str:
    """A grammar in Lark or in llama.cpp's GBNF, as Lark."""
    try:
        return any_to_lark(source)
    except Exception as error:  # what the library raises for a rule that is nowhere
        raise InvalidRequest(f"the grammar cannot be read: {error}") from error
