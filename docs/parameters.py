"""Writes parameters.md from the Structs of the dialects: `python -m docs.parameters`."""

from collections.abc import Iterator
from pathlib import Path

from daemon.api.anthropic_messages_request import PARAMETERS as MESSAGES
from daemon.api.openai_chat_request import PARAMETERS as CHAT
from daemon.api.openai_completions_request import PARAMETERS as COMPLETIONS
from daemon.api.openai_responses_request import PARAMETERS as RESPONSES
from daemon.api.parameters import Parameters

TABLE = Path(__file__).with_suffix(".md")

DIALECTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)

HEAD = """\
# Parameters

Made from the source by `python -m docs.parameters`; do not edit. Every name at the top level of a
body is in one of three lists: **honoured**; **accepted without effect**, on purpose, since it
concerns the provider's account, storage or speed; or **refused** with an error that names it, since
it would change the answer and cannot be honoured (null, false, 0 and empty values pass).

Anything else is accepted, since clients send extras of many servers, but not in silence: the
response's header `x-qwend-ignored` names it.
"""


def table() -> str:
    """The whole file."""
    return "\n".join((HEAD, *(line for dialect in DIALECTS for line in _section(dialect))))


def _section(dialect: Parameters) -> Iterator[str]:
    yield f"## {dialect.path}\n"
    yield "| honoured | values, and what is special |\n| --- | --- |"
    yield from (_row(name, text) for name, text in dialect.honoured())
    yield "\n| accepted without effect | why |\n| --- | --- |"
    yield from (_row(name, text) for name, text in sorted(dialect.no_ops.items()))
    yield "\n| refused | why |\n| --- | --- |"
    yield from (_row(name, text) for name, text in sorted(dialect.refused.items()))
    yield ""


def _row(name: str, text: str) -> str:
    return f"| `{name}` | {text.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    TABLE.write_text(table())
