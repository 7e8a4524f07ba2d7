"""`qwend logits`: the logits of a list of token ids, to compare engines. Main thread."""

import argparse
from pathlib import Path
from typing import Any

from daemon.commands.flags import (
    add_device_flag,
    add_memory_flag,
    add_model_flag,
    gpu_memory,
)
from daemon.config import EngineConfig, ModelConfig
from daemon.errors import ConfigError


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("logits", help="write the logits of a list of token ids")
    add_model_flag(parser)
    add_device_flag(parser)
    add_memory_flag(parser)
    parser.add_argument("--tokens", type=Path, required=True, help="token ids, an .npy vector")
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write float32 [tokens, vocab], .npy"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the tokens and write their logits."""
    import numpy as np

    from daemon.assemble import load_for_evaluation
    from daemon.engine.evaluation import evaluate

    try:
        tokens = np.load(arguments.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--tokens {arguments.tokens}: {error}") from error
    engine = EngineConfig(device=arguments.device, gpu_memory_bytes=gpu_memory(arguments))
    model = load_for_evaluation(ModelConfig(path=arguments.model), engine, tokens.size)
    logits = evaluate(model, tokens)
    try:
        np.save(arguments.out, logits)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: {error}") from error
    print(f"{arguments.out}: float32 {list(logits.shape)}")
