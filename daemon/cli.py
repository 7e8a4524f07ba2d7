"""The command line: flags to a Config, and one function a command.

Imports nothing heavy before it knows the command, so that `--help` is instant.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from daemon import __version__
from daemon.config import (
    DEFAULT_CONTEXT,
    DEFAULT_PORT,
    CacheConfig,
    Config,
    EngineConfig,
    ModelConfig,
    ServerConfig,
    default_cache_folder,
    parse_bytes,
)
from daemon.errors import ConfigError, QwendError

CLIENT_COMMANDS = {"chat": "qwend_clients.chat", "inspect": "qwend_clients.inspect_cache"}
"""Commands that live in clients/ and read their own flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in CLIENT_COMMANDS:
            client = import_module(CLIENT_COMMANDS[arguments[0]])
            return int(client.main(arguments[1:]))
        return _run(_parser().parse_args(arguments))
    except QwendError as error:
        print(f"qwend: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    commands = {"serve": _serve, "generate": _generate, "logits": _logits}
    commands[arguments.command](arguments)
    return 0


# ── commands ──────────────────────────────────────────────────────────────────────────────────


def _serve(arguments: argparse.Namespace) -> None:
    from daemon.api.server import bind, run_server
    from daemon.assemble import assemble
    from daemon.logs import configure_logs

    config = _config(arguments)
    configure_logs()
    with bind(config.server.host, config.server.port) as listener, assemble(config) as daemon:
        info = daemon.engine.info
        run_server(
            daemon.app(),
            listener,
            lambda url: _announce(url, info.model_name, info.backend, config),
        )


def _announce(url: str, model: str, backend: str, config: Config) -> None:
    if config.model.path is None:
        print("No --model given: serving the embedded tiny-coder (15 M), for trying things out.")
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]})
    cache = f"checkpoints in {config.cache.folder}" if config.cache.enabled else "no checkpoints"
    print(f"qwend {__version__} serves {model} at {url}/v1 on {backend} ({cache})")
    print(f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"Or:  qwend chat --url {url}", flush=True)


def _generate(arguments: argparse.Namespace) -> None:
    import msgspec

    from daemon.assemble import assemble
    from daemon.generate import generate

    with assemble(_config(arguments)) as daemon:
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


def _logits(arguments: argparse.Namespace) -> None:
    import numpy as np

    from daemon.assemble import load_for_evaluation
    from daemon.engine.evaluation import evaluate

    try:
        tokens = np.load(arguments.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--tokens {arguments.tokens}: {error}") from error
    model = load_for_evaluation(
        ModelConfig(path=arguments.model), EngineConfig(device=arguments.device)
    )
    logits = evaluate(model, tokens)
    try:
        np.save(arguments.out, logits)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: {error}") from error
    print(f"{arguments.out}: float32 {list(logits.shape)}")


# ── flags ─────────────────────────────────────────────────────────────────────────────────────


def _config(arguments: argparse.Namespace) -> Config:
    is_server = arguments.command == "serve"
    return Config(
        model=ModelConfig(
            path=arguments.model,
            alias=arguments.alias if is_server else None,
            chat_template_file=arguments.chat_template_file,
        ),
        engine=EngineConfig(
            device=arguments.device,
            key_format=arguments.cache_type_k,
            value_format=arguments.cache_type_v,
            context=arguments.ctx,
            parallel=arguments.parallel if is_server else 1,
            strict=arguments.strict,
        ),
        cache=CacheConfig(
            enabled=not arguments.no_cache,
            folder=arguments.cache_dir or default_cache_folder(),
            budget_bytes=parse_bytes(arguments.cache_size),
            interval_tokens=arguments.checkpoint_interval,
        ),
        server=ServerConfig(host=arguments.host, port=arguments.port)
        if is_server
        else ServerConfig(),
    )


class _Parser(argparse.ArgumentParser):
    """Refuses with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qwend",
        description="Serve Qwen 3.5 to coding agents from a GGUF file, and evaluate nothing twice.",
    )
    parser.add_argument("--version", action="version", version=f"qwend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over the OpenAI API")
    _add_model_flags(serve)
    _add_server_flags(serve)
    _add_cache_flags(serve)
    generate = commands.add_parser("generate", help="answer one prompt on the terminal")
    _add_model_flags(generate)
    _add_generate_flags(generate)
    _add_cache_flags(generate)
    logits = commands.add_parser("logits", help="write the logits of a list of token ids")
    logits.add_argument("--model", "-m", type=Path, help="GGUF file (default: the embedded model)")
    _add_device_flag(logits)
    logits.add_argument("--tokens", type=Path, required=True, help="token ids, an .npy vector")
    logits.add_argument(
        "--out", type=Path, required=True, help="where to write float32 [tokens, vocab], .npy"
    )
    for name, text in (("chat", "chat with a server"), ("inspect", "show what the store holds")):
        commands.add_parser(name, help=f"{text} (see qwend {name} --help)", add_help=False)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", "-m", type=Path, help="GGUF file (default: the embedded model)")
    group.add_argument("--chat-template-file", type=Path, help="instead of the file's own template")
    group.add_argument(
        "--ctx", "-c", type=_positive, metavar="TOKENS",
        help=f"context length (default: the model's, at most {DEFAULT_CONTEXT})",
    )  # fmt: skip
    _add_device_flag(group)
    for which in ("k", "v"):
        group.add_argument(
            f"--cache-type-{which}", f"-ct{which}", choices=("bf16", "q8_0", "fp8", "q4_0"),
            default="bf16", help=f"how the GPU keeps {which.upper()} of the cache (%(default)s)",
        )  # fmt: skip
    group.add_argument(
        "--strict", action="store_true",
        help="resume only from states born by prompt evaluation, which equal a cold run bit by bit",
    )  # fmt: skip


def _add_device_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to compute; auto takes the GPU where there is one (%(default)s)",
    )  # fmt: skip


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port, 0 for a free one (%(default)s)"
    )
    group.add_argument("--alias", help="the model's name for clients (default: the file's name)")
    group.add_argument(
        "--parallel", "-np", type=_positive, default=4, metavar="N",
        help="requests that are evaluated together; more wait (%(default)s)",
    )  # fmt: skip


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the user's message")
    group = parser.add_argument_group("generation")
    group.add_argument("--max-tokens", type=_positive, help="length of the reply at most")
    group.add_argument("--temperature", type=_non_negative, help="0 is greedy")
    group.add_argument("--seed", type=int, help="makes a sampled reply repeatable")
    group.add_argument("--no-thinking", action="store_true", help="answer without reasoning")


def _add_cache_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--cache-dir", type=Path, help=f"the store ({default_cache_folder()})")
    group.add_argument("--cache-size", default="20G", help="its budget on disk (%(default)s)")
    group.add_argument(
        "--checkpoint-interval", type=_positive, default=1024, metavar="TOKENS",
        help="spacing of checkpoints inside a long prompt (%(default)s)",
    )  # fmt: skip
    group.add_argument("--no-cache", action="store_true", help="find and keep no checkpoints")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not zero or a positive number")
    return value
