"""Flags for what a request does not say: sampling, length, thinking. llama-server's names too.

Owns their ranges, which are those of a request. Main thread.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from daemon.commands.number_flags import within
from daemon.config import ReplyConfig
from daemon.errors import ConfigError

SAMPLING: tuple[tuple[tuple[str, ...], Callable[[str], Any], str], ...] = (
    (("--temperature", "--temp"), within(float, 0, 2), "0 is greedy"),
    (("--top-p",), within(float, 0, 1), "keeps the likeliest tokens up to this share"),
    (("--top-k",), within(int, 0, 2**31 - 1), "keeps so many tokens, 0: all"),
    (("--min-p",), within(float, 0, 1), "keeps tokens of this share of the likeliest's"),
    (("--repetition-penalty", "--repeat-penalty"), within(float, 0.01, 10), "1 is none"),
    (("--presence-penalty",), within(float, -2, 2), "0 is none"),
    (("--frequency-penalty",), within(float, -2, 2), "0 is none"),
    (("--seed", "-s"), within(int, -1, 2**63 - 1), "makes replies repeatable; -1: they are not"),
)


def add_reply_flags(parser: argparse.ArgumentParser) -> None:
    """What a request that does not say otherwise gets."""
    group = parser.add_argument_group(
        "replies, where a request does not say otherwise (default: what the model file recommends)"
    )
    for names, kind, text in SAMPLING:
        group.add_argument(*names, type=kind, metavar="N", help=text)
    group.add_argument(
        "--max-tokens", "-n", "--predict", "--n-predict", type=within(int, -2, 2**31), metavar="N",
        help="length of a reply at most; below 0: what the context leaves",
    )  # fmt: skip
    group.add_argument(
        "--thinking-budget", "--reasoning-budget", type=within(int, -1, 2**31), metavar="N",
        help="tokens after which thinking is led to its end; 0: no thinking, -1: no limit",
    )  # fmt: skip
    group.add_argument("--reasoning-effort", metavar="LEVEL", help="as requests say it")
    group.add_argument("--reasoning", "-rea", choices=("on", "off", "auto"), help="thinking or not")
    group.add_argument(
        "--chat-template-kwargs", metavar="JSON", help="variables for the chat template"
    )


def reply_settings(arguments: argparse.Namespace) -> ReplyConfig:
    """The section that these flags make.

    Raises:
        ConfigError: the template's variables are no JSON object.
    """
    options = _template_options(arguments.chat_template_kwargs)
    budget = arguments.thinking_budget
    if budget == 0 or arguments.reasoning == "off":
        options = {"enable_thinking": False} | options
    elif arguments.reasoning == "on":
        options = {"enable_thinking": True} | options
    return ReplyConfig(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        seed=_above(arguments.seed, -1),
        max_tokens=_above(arguments.max_tokens, 0),
        thinking_budget=_above(budget, 0),
        reasoning_effort=arguments.reasoning_effort,
        template_options=options,
    )


def _above(value: int | None, limit: int) -> int | None:
    return value if value is not None and value > limit else None


def _template_options(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    try:
        options = json.loads(given)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError("--chat-template-kwargs: must be a JSON object")
    return options
