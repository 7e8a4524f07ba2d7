"""`qwend inspect why` and `plan`: what requests reused and why not more, from a running daemon.

Owns the look of a plan. HTTP is client.py's. One thread.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .client import Client, ServerRefused
from .terminal import age, console, printable

_ID_LENGTH = 12


def register(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands."""
    text = "say what a request reused, and why not more"
    why = commands.add_parser("why", help=text, description=text, parents=[shared])
    why.add_argument("request", nargs="?", help="its id (default: list the last requests)")
    why.set_defaults(run=_why)
    text = "say what a request would reuse, without sending it"
    plan = commands.add_parser("plan", help=text, description=text, parents=[shared])
    plan.add_argument("file", type=Path, help="its body, JSON")
    plan.add_argument("--dialect", help="chat, messages, responses … (default: by its keys)")
    plan.set_defaults(run=_plan)


def show_plan(plan: dict[str, Any], output: Console) -> None:
    """One plan: what was reused, where the prompts part, what it cost."""
    output.print(Text(printable(plan["summary"]), style="bold"))
    output.print(_facts(plan))
    if plan["difference"]:
        output.print(_difference(plan["difference"]))


def show_list(plans: list[dict[str, Any]], output: Console, now_s: float) -> None:
    """The last requests, a line each."""
    table = Table(title="Requests, the newest first", title_justify="left")
    table.add_column("request", no_wrap=True)
    for heading in ("when", "prompt", "reused", "new", "lost", "lost s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("cause")
    for plan in plans:
        lost = plan["lost_tokens"]
        table.add_row(
            plan["request"][:_ID_LENGTH],
            age(int(plan["created"] * 1e6), int(now_s * 1e6)),
            *(f"{number:,}" for number in _numbers(plan)),
            f"{plan['lost_s']:.2f}" if lost else "",
            plan["cause"] or "",
            style="yellow" if lost else "",
        )
    output.print(table)


def _why(arguments: argparse.Namespace) -> None:
    with Client(arguments.url, api_key=arguments.api_key) as client:
        plans = client.plans()
        if arguments.request:
            found = [p for p in plans if p["request"].startswith(arguments.request)]
            plan = found[0] if found else client.plan(arguments.request)
    if arguments.json:
        print(json.dumps(plan if arguments.request else plans, indent=2, ensure_ascii=False))
    elif arguments.request:
        show_plan(plan, console())
    else:
        show_list(plans, console(), time.time())


def _plan(arguments: argparse.Namespace) -> None:
    try:
        body = arguments.file.read_bytes()
    except OSError as error:
        raise ServerRefused(f"{arguments.file}: {error.strerror}.", 0) from error
    with Client(arguments.url, api_key=arguments.api_key) as client:
        plan = client.dry_run(body, arguments.dialect)
    if arguments.json:
        print(json.dumps(plan, indent=2, ensure_ascii=False))
    else:
        show_plan(plan, console())


def _numbers(plan: dict[str, Any]) -> tuple[int, ...]:
    reused = plan["restored"]["tokens"]
    return plan["prompt_tokens"], reused, plan["new_tokens"], plan["lost_tokens"]


def _facts(plan: dict[str, Any]) -> Table:
    restored, nearest = plan["restored"], plan["nearest"]
    facts = Table.grid(padding=(0, 2))
    tier = f" from {restored['tier']} ({restored['reason']})" if restored["tier"] else ""
    facts.add_row("reused", f"{restored['tokens']:,} of {plan['prompt_tokens']:,} tokens{tier}")
    evaluated = f"{plan['evaluated_tokens']:,} tokens in {plan['prompt_s']:.2f} s"
    facts.add_row("evaluated", f"{evaluated}: {plan['new_tokens']:,} new")
    if plan["lost_tokens"]:
        lost = f"{plan['lost_tokens']:,} tokens, {plan['lost_s']:.2f} s: {plan['cause']}"
        facts.add_row("lost", Text(lost, style="yellow"))
    if nearest:
        name = nearest["request"] or f"one of an earlier run, session {nearest['session']}"
        common = f"{nearest['common_tokens']:,} tokens as {name}, {nearest['age_s']:.0f} s before"
        facts.add_row("begins like", printable(common))
    return facts


def _difference(difference: dict[str, Any]) -> Table:
    tool = f", tool {difference['tool']}" if difference["tool"] else ""
    message = difference["message"]
    where = "tools" if message is None else f"message {message} ({difference['role']})"
    table = Table(
        title=printable(f"They part at token {difference['position']:,}: {where}, "
                        f"{difference['part']}{tool}"),
        title_justify="left", show_header=False,
    )  # fmt: skip
    for name, key, style in (
        ("both", "shared", "dim"), ("then", "before", "red"), ("now", "after", "green"),
    ):  # fmt: skip
        table.add_row(name, Text(_visible(difference[key]), style=style))
    return table


def _visible(text: str) -> str:
    """On one line, with the ends of lines marked."""
    return printable(text.replace("\n", "⏎"))
