"""A model that does a small job with whatever shell tool its agent offers, step by step.

It knows only the prompt, as a model does: which task was asked last, and how many results of tools
have come since.
"""

import re
from dataclasses import dataclass

from scripted_app import spell_reply

from daemon.engine.requests import GenerationRequest
from daemon.text.messages import ToolCall
from daemon.text.tokenizer import Tokenizer

FIX = "Please repair the function add in calc.py; this is task ALPHA."
ASK = "What does calc.py say now? This is task BETA."
FIXED = "I have repaired add: it adds now."
TOLD = "It says that add returns a + b."
SUMMARY = "So far: the user asked: {} Nothing of it is done yet."
TITLE = "Repairing a function"

COMPACTION = "summar|compact|state_snapshot"

COMMANDS = {
    "ALPHA": ("cat calc.py", "sed -i 's/a - b/a + b/' calc.py && python3 -c 'import calc; "
                             "print(calc.add(2, 3))'"),
    "BETA": ("cat calc.py",),
}  # fmt: skip
ANSWERS = {"ALPHA": FIXED, "BETA": TOLD}


@dataclass(frozen=True)
class Shell:
    """An agent's tool that runs a command."""

    tool: str
    argument: str
    others: tuple[tuple[str, object], ...] = ()

    def call(self, command: str) -> ToolCall:
        return ToolCall("", self.tool, {self.argument: command, **dict(self.others)})


@dataclass(frozen=True)
class Coder:
    """Answers each request; `shell` None is an agent that edits by text (aider)."""

    tokenizer: Tokenizer
    shell: Shell | None

    def reply(self, request: GenerationRequest) -> str:
        """The next step of the task asked last, or something short for a side request."""
        prompt = self.tokenizer.decode(request.tokens)
        thinking_open = prompt.rfind("<think>") > prompt.rfind("</think>")
        tasks = list(re.finditer("task (ALPHA|BETA)", prompt))
        if not tasks or _asks_for_a_summary(prompt):
            asked = {"ALPHA": FIX, "BETA": ASK}.get(tasks[-1][1]) if tasks else None
            text = SUMMARY.format(asked) if asked else TITLE
            return spell_reply(text, [], reasoning="Short.", thinking_open=thinking_open)
        task = tasks[-1][1]
        if self.shell is None:
            text = EDIT if task == "ALPHA" else TOLD
            return spell_reply(text, [], reasoning="I edit.", thinking_open=thinking_open)
        done = prompt[tasks[-1].end() :].count("<tool_response>")
        if done < len(COMMANDS[task]) and self.shell.tool in prompt:
            call = self.shell.call(COMMANDS[task][done])
            return spell_reply(
                f"Step {done + 1}.", [call], reasoning="One step.", thinking_open=thinking_open
            )
        return spell_reply(ANSWERS[task], [], reasoning="Done.", thinking_open=thinking_open)


def _asks_for_a_summary(prompt: str) -> bool:
    """Whether the newest message wants the history compacted, which has not been done yet."""
    newest = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    is_result = newest.startswith("<tool_response>")
    is_done = "So far: the user asked:" in prompt
    return not (is_result or is_done) and bool(re.search(COMPACTION, newest[:6000], re.I))


EDIT = f"""{FIXED}

calc.py
```
<<<<<<< SEARCH
    return a - b
=======
    return a + b
>>>>>>> REPLACE
```
"""
