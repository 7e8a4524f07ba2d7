"""Writes flags.md from the tables of the command line: `python -m docs.flags`."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from daemon.commands.llama_flags import REFUSED, WITHOUT_EFFECT, Flag
from daemon.commands.serve import register
from daemon.config import default_cache_folder

TABLE = Path(__file__).with_suffix(".md")

HEAD = """\
# Flags of qwend serve

Made from the source by `python -m docs.flags`; do not edit. A script for llama-server runs with
`qwend serve` in its place: a flag of its has an effect, or none, which a line at the start says, or
is refused by name. `-ngl 0` computes on the CPU; any other number of layers has no effect, since
all of them are on the GPU. `--reasoning-format` takes `deepseek` and `auto`; `none` is refused.
So is whatever is not listed here, such as further flags of speculative decoding.
"""


def table() -> str:
    """The whole file."""
    lines = (
        *_own(),
        *_others("llama-server's flags without effect", WITHOUT_EFFECT),
        *_others("llama-server's flags that are refused", REFUSED),
    )
    return "\n".join((HEAD, *lines, ""))


def _own() -> Iterator[str]:
    commands = argparse.ArgumentParser(prog="qwend").add_subparsers()
    register(commands)
    for group in commands.choices["serve"]._action_groups:
        actions = [a for a in group._group_actions if a.help not in (None, argparse.SUPPRESS)]
        if not actions or group.title == "options":
            continue
        yield f"## {(group.title or '').capitalize()}\n\n| flag | meaning |\n| --- | --- |"
        for action in actions:
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            yield f"| {names} | {_help(action)} |"
        yield ""


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%(default)s", f"default: {action.default}")
    here, anywhere = str(default_cache_folder()), "~/.cache/qwend/checkpoints"
    return text.replace(here, anywhere).replace("|", r"\|")


def _others(title: str, flags: Sequence[Flag]) -> Iterator[str]:
    yield f"## {title}\n\n| flag | why |\n| --- | --- |"
    for flag in flags:
        names = ", ".join(f"`{name}`" for name in flag.names)
        yield f"| {names} | {flag.why} |"
    yield ""


if __name__ == "__main__":
    TABLE.write_text(table())
