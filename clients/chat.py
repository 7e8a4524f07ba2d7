"""`qwend chat`: a conversation in the terminal, streamed.

Owns the terminal: prompt, commands, what an answer looks like. HTTP is client.py's. One thread;
Ctrl-C ends the answer that is being written, never the program.
"""

import argparse
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .client import DEFAULT_URL, Client, ClientError, Part, Usage

with suppress(ImportError):  # absent on some systems; then lines cannot be edited
    import readline  # noqa: F401

FENCE = '"""'
PASTE_PAUSE_S = 0.03
HELP = """\
/reset    forget the conversation      /stats  what the server reused
/think    switch thinking on or off    /help   this list
/quit     end (Ctrl-D too)             Ctrl-C  stop the answer
Several lines: paste them, or put them between lines of \"\"\"."""

ReadLine = Callable[[str], str]
"""Gives one line for a prompt, as `input` does; EOFError at the end."""


class Chat:
    """A conversation with one server, kept here and sent whole every time."""

    def __init__(self, client: Client, console: Console, read_line: ReadLine) -> None:
        self._client = client
        self._console = console
        self._read_line = read_line
        self._messages: list[dict[str, Any]] = []
        self._thinking = True

    def run(self) -> None:
        """Read and answer until the user ends."""
        while True:
            try:
                text = self._read_message()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print("\n[dim]/quit or Ctrl-D ends.[/dim]")
                continue
            if text == "/quit":
                return
            if text:
                self._handle(text)

    def _handle(self, text: str) -> None:
        commands: dict[str, Callable[[], None]] = {
            "/reset": self._reset,
            "/stats": self._show_stats,
            "/think": self._switch_thinking,
            "/help": lambda: self._console.print(HELP, style="dim", markup=False),
        }
        try:
            if text in commands:
                commands[text]()
            elif text.startswith("/") and " " not in text and text[1:].isalpha():
                self._console.print(f"No command {text}; /help lists them.", style="yellow")
            else:
                self._ask(text)
        except ClientError as error:
            show_error(self._console, error)

    def _read_message(self) -> str:
        line = self._read_line("\n> ")
        if line.strip() != FENCE:
            return line.strip()
        lines: list[str] = []
        while (line := self._read_line("… ")).strip() != FENCE:
            lines.append(line)
        return "\n".join(lines)

    def _ask(self, text: str) -> None:
        question = {"role": "user", "content": text}
        options: dict[str, Any] = {} if self._thinking else {"enable_thinking": False}
        answer = _Answer(self._console)
        try:
            with closing(self._client.chat([*self._messages, question], **options)) as parts:
                answer.show(parts)
        except KeyboardInterrupt:
            answer.interrupted()
        finally:
            answer.end()
        if answer.content or answer.reasoning:
            self._messages += [question, answer.message()]

    def _reset(self) -> None:
        self._messages.clear()
        self._console.print("[dim]A new conversation.[/dim]")

    def _switch_thinking(self) -> None:
        self._thinking = not self._thinking
        self._console.print(f"[dim]Thinking is {'on' if self._thinking else 'off'}.[/dim]")

    def _show_stats(self) -> None:
        self._console.print(stats_table(self._client.stats()))


class _Answer:
    """One answer on its way to the screen."""

    def __init__(self, console: Console) -> None:
        self.content = ""
        self.reasoning = ""
        self._console = console
        self._waiting = console.status("", spinner="dots")
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._usage: Usage | None = None
        self._column_used = False

    def show(self, parts: Any) -> None:
        self._waiting.start()
        for part in parts:
            self._show(part)

    def message(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.content}
        return message | ({"reasoning_content": self.reasoning} if self.reasoning else {})

    def interrupted(self) -> None:
        self._finish_line()
        self._console.print("[dim]stopped[/dim]")

    def end(self) -> None:
        self._waiting.stop()
        self._finish_line()
        if self._usage is not None:
            self._console.print(self._footer(self._usage), style="dim", highlight=False)

    def _show(self, part: Part) -> None:
        if part.reasoning:
            self._write(part.reasoning, "dim italic")
            self.reasoning += part.reasoning
        if part.content:
            if self.reasoning and not self.content:
                self._write("\n\n", "")
            self._write(part.content, "")
            self.content += part.content
        for call in part.calls:
            self._write(f"\n{call.name}({call.arguments})", "cyan")
        self._usage = part.usage or self._usage

    def _write(self, text: str, style: str) -> None:
        if self._first_s is None:
            self._first_s = time.monotonic()
            self._waiting.stop()
        self._console.print(Text(text, style), end="", soft_wrap=True)
        self._column_used = not text.endswith("\n")

    def _finish_line(self) -> None:
        if self._column_used:
            self._console.print()
            self._column_used = False

    def _footer(self, usage: Usage) -> str:
        first_s = self._first_s or time.monotonic()
        seconds = time.monotonic() - first_s
        speed = f" · {usage.num_reply / seconds:.0f} tok/s" if seconds > 0 else ""
        return (
            f"{usage.num_reply} tokens{speed} · first after {first_s - self._started_s:.1f} s"
            f" · {usage.num_cached:,} of {usage.num_prompt:,} prompt tokens reused"
        )


def stats_table(stats: dict[str, Any]) -> Table:
    """The statistics' sums, overall and over the last minutes; below them the store's."""
    table = Table(title="Tokens", title_justify="left", box=None, pad_edge=False)
    if store := stats.get("store"):
        mebibytes = store.get("num_bytes", 0) / 2**20
        table.caption = f"{store.get('num_checkpoints', 0):,} checkpoints, {mebibytes:,.0f} MiB"
    for heading in ("", "requests", "reused", "evaluated", "generated", "hit rate"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [("since the start", stats["total"])]
    rows += [(f"last {int(span) // 60} min", row) for span, row in stats["windows"].items()]
    for name, row in rows:
        counts = [row[key] for key in ("requests", "tokens_reused", "tokens_evaluated")]
        counts.append(row["tokens_generated"])
        table.add_row(name, *(f"{count:,}" for count in counts), f"{row['hit_rate']:.1%}")
    return table


def show_error(console: Console, error: ClientError) -> None:
    """One line, whatever the terminal's width."""
    console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)


def read_pasted(prompt: str) -> str:
    """A line from the keyboard, or all the lines of a paste: what follows without a pause."""
    lines = [input(prompt)]
    while sys.stdin.isatty() and select.select([sys.stdin], [], [], PASTE_PAUSE_S)[0]:
        lines.append(input())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the terminal chat; the exit status."""
    parser = argparse.ArgumentParser(prog="qwend chat", description="Chat with a qwend server.")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        with Client(arguments.url, api_key=arguments.api_key) as client:
            [model, *_] = client.models()
            context = f"{model['context_length']:,} tokens of context"
            about = f"at {client.url}, {context}\n/help lists the commands."
            console.print(Text.assemble((model["id"], "bold"), " ", (about, "dim")))
            Chat(client, console, read_pasted).run()
    except ClientError as error:
        show_error(Console(stderr=True), error)
        return 1
    return 0
