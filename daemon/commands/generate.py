"""`qwend generate`: answers one prompt on the terminal. Main thread."""

import argparse
import sys
from typing import Any

from daemon.commands.flags import add_cache_flags, add_model_flags, config_of
from daemon.commands.number_flags import non_negative, positive


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("generate", help="answer one prompt on the terminal")
    add_model_flags(parser)
    _add_flags(parser)
    add_cache_flags(parser)
    parser.set_defaults(run=run)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the user's message")
    group = parser.add_argument_group("generation")
    group.add_argument("--max-tokens", type=positive, help="length of the reply at most")
    group.add_argument("--temperature", type=non_negative, help="0 is greedy")
    group.add_argument("--seed", type=int, help="makes a sampled reply repeatable")
    group.add_argument("--no-thinking", action="store_true", help="answer without reasoning")


def run(arguments: argparse.Namespace) -> None:
    """Write the answer to standard output, the reasoning to standard error."""
    import msgspec

    from daemon.assemble import assemble
    from daemon.generate import generate

    with assemble(config_of(arguments)) as daemon:
        given = {"temperature": arguments.temperature, "seed": arguments.seed}
        changes = {name: value for name, value in given.items() if value is not None}
        generate(
            daemon.service,
            arguments.prompt,
            msgspec.structs.replace(daemon.service.sampling, **changes),
            arguments.max_tokens,
            thinking=not arguments.no_thinking,
            write_content=lambda text: print(text, end="", flush=True),
            write_reasoning=lambda text: print(text, end="", flush=True, file=sys.stderr),
        )
        print()
