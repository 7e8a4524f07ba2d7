"""`qwend check`: what a model takes of the GPU's memory, before anything is loaded. Main thread."""

import argparse
from typing import Any

from daemon.commands.flags import add_context_flags, add_model_flag, add_parallel_flag, gpu_memory
from daemon.config import EngineConfig, ModelConfig

UNKNOWN = 2
"""Exit status where nothing says how much memory there is; 0: it fits, 1: it does not."""


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("check", help="show what a model takes of the GPU; loads nothing")
    add_model_flag(parser)
    add_context_flags(parser)
    add_parallel_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the exit status says whether it fits."""
    from daemon.assemble import memory_plan
    from daemon.memory_report import print_report

    engine = EngineConfig(
        key_format=arguments.cache_type_k,
        value_format=arguments.cache_type_v,
        context=arguments.ctx,
        parallel=arguments.parallel,
        gpu_memory_bytes=gpu_memory(arguments),
    )
    plan = memory_plan(ModelConfig(path=arguments.model), engine)
    print_report(plan, engine)
    plan.check()
    return UNKNOWN if plan.budget_bytes is None else 0
