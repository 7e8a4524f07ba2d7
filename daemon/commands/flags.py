"""The flags that commands share, and the Config that they make.

Owns their names, defaults and help. Imports nothing heavy. Main thread.
"""

import argparse
from pathlib import Path

from daemon.commands.access_flags import access_settings
from daemon.commands.number_flags import non_negative, positive, share, whole
from daemon.commands.reply_flags import reply_settings
from daemon.config import (
    DEFAULT_CONTEXT,
    DEFAULT_PORT,
    CacheConfig,
    Config,
    EngineConfig,
    ModelConfig,
    ReplyConfig,
    ServerConfig,
    default_cache_folder,
    default_cache_memory,
    parse_bytes,
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, on which device, in what form."""
    group = parser.add_argument_group("model")
    add_model_flag(group)
    group.add_argument("--chat-template-file", type=Path, help="instead of the file's own template")
    add_device_flag(group)
    add_context_flags(group)
    group.add_argument(
        "--strict", action="store_true",
        help="resume only from states born by prompt evaluation, which equal a cold run bit by bit",
    )  # fmt: skip


def add_model_flag(parser: argparse._ActionsContainer) -> None:
    """Which file."""
    parser.add_argument("--model", "-m", type=Path, help="GGUF file (default: the embedded model)")


def add_context_flags(parser: argparse._ActionsContainer) -> None:
    """How much context, and in how much memory."""
    parser.add_argument(
        "--ctx", "-c", "--ctx-size", type=whole, metavar="TOKENS",
        help=f"context length; 0: all of the model's (default: at most {DEFAULT_CONTEXT} of it)",
    )  # fmt: skip
    for which in ("k", "v"):
        parser.add_argument(
            f"--cache-type-{which}", f"-ct{which}", choices=("bf16", "q8_0", "fp8", "q4_0"),
            type=_kv_format, default="bf16",
            help=f"how the GPU keeps {which.upper()} of the cache; f16 is bf16 here (%(default)s)",
        )  # fmt: skip
    add_memory_flag(parser)


def add_memory_flag(parser: argparse._ActionsContainer) -> None:
    """A cap on what is taken of the GPU."""
    parser.add_argument(
        "--gpu-memory", metavar="SIZE",
        help="the most that qwend may take of the GPU, for example 24G (default: what is free)",
    )  # fmt: skip


def add_parallel_flag(parser: argparse._ActionsContainer) -> None:
    """How many requests at once."""
    parser.add_argument(
        "--parallel", "-np", type=positive, default=4, metavar="N",
        help="requests that are evaluated together; more wait (%(default)s)",
    )  # fmt: skip


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Where to compute."""
    parser.add_argument(
        "--device", "-dev", choices=("auto", "cpu", "cuda"), default="auto", type=_device,
        help="where to compute; auto takes the GPU where there is one (%(default)s)",
    )  # fmt: skip


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Where to listen, and for how many."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port, 0 for a free one (%(default)s)"
    )
    group.add_argument(
        "--alias", "-a", help="the model's name for clients (default: the file's name)"
    )
    add_parallel_flag(group)
    group.add_argument(
        "--no-idle-work", action="store_true",
        help="leave the device alone between requests: no reply is evaluated again as a prompt,"
        " and no next prompt before it comes",
    )  # fmt: skip
    group.add_argument(
        "--queue-timeout", type=non_negative, default=600, metavar="SECONDS",
        help="tell a request to come back that waits longer for its turn; 0: never (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--request-timeout", type=non_negative, default=0, metavar="SECONDS",
        help="end a request that takes longer; 0: never (%(default)s)",
    )  # fmt: skip


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """The checkpoint store."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--cache-dir", type=Path, help=f"the store ({default_cache_folder()})")
    group.add_argument("--cache-size", default="20G", help="its budget on disk (%(default)s)")
    group.add_argument(
        "--cache-ram", "-cram", metavar="SIZE",
        help="of it, kept in memory too; 0 for nothing, a number alone is MiB as llama-server's "
        "(default: 1/8 of the memory, at most 8G)",
    )  # fmt: skip
    group.add_argument(
        "--cache-writes", default="200G", metavar="SIZE",
        help="written to the store in a day at most, what saves little being left out from half of"
        " it on; 0 for as much as comes (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--write-delay", type=whole, default=10, metavar="SECONDS",
        help="how long checkpoints that are superseded soon, as a rule, wait to be written"
        " (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--stop-grace", type=whole, default=10, metavar="SECONDS",
        help="how long waiting checkpoints are still written when told to stop, the newest first"
        " (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint-interval", type=positive, metavar="TOKENS",
        help="spacing of checkpoints inside a long prompt (default: by the size of a state)",
    )  # fmt: skip
    group.add_argument(
        "--audit-share", type=share, default=0.0, metavar="SHARE",
        help="share of resumed requests, such as 0.01, to evaluate again cold when idle and compare"
        " (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--normalise", default="safe", metavar="RULES",
        help="rules that take clients' noise out of prompts, with commas; safe, all, none"
        " (%(default)s)",
    )  # fmt: skip
    group.add_argument("--no-cache", action="store_true", help="find and keep no checkpoints")


def config_of(arguments: argparse.Namespace) -> Config:
    """Every setting, from the flags of `serve` or `generate`.

    Raises:
        ConfigError: a value that no setting can have.
    """
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
            gpu_memory_bytes=gpu_memory(arguments),
            canonical=is_server and not arguments.no_idle_work,
        ),
        cache=CacheConfig(
            enabled=not arguments.no_cache,
            folder=arguments.cache_dir or default_cache_folder(),
            budget_bytes=parse_bytes(arguments.cache_size),
            interval_tokens=arguments.checkpoint_interval,
            daily_bytes=_daily_bytes(arguments.cache_writes),
            write_delay_s=arguments.write_delay,
            stop_grace_s=arguments.stop_grace,
            memory_bytes=_memory_bytes(arguments),
            audit_share=arguments.audit_share,
            normalise=arguments.normalise,
        ),
        server=ServerConfig(
            host=arguments.host,
            port=arguments.port,
            queue_timeout_s=arguments.queue_timeout or None,
            request_timeout_s=arguments.request_timeout or None,
            **access_settings(arguments),
        )
        if is_server
        else ServerConfig(),
        reply=reply_settings(arguments) if is_server else ReplyConfig(),
    )


def _kv_format(text: str) -> str:
    """llama-server's default takes as much room as ours, and is said to be ours."""
    return "bf16" if text == "f16" else text


def _device(text: str) -> str:
    """llama-server's names of the first GPU and of none."""
    return {"CUDA0": "cuda", "none": "cpu"}.get(text, text)


def gpu_memory(arguments: argparse.Namespace) -> int | None:
    """Bytes of --gpu-memory, None where it is not given.

    Raises:
        ConfigError: it is no size.
    """
    return None if arguments.gpu_memory is None else parse_bytes(arguments.gpu_memory)


def _memory_bytes(arguments: argparse.Namespace) -> int:
    """llama-server counts in MiB, and means no limit by -1."""
    match arguments.cache_ram:
        case None:
            return default_cache_memory()
        case "0":
            return 0
        case "-1":
            return parse_bytes(arguments.cache_size)
    alone = arguments.cache_ram.isdecimal()
    return parse_bytes(f"{arguments.cache_ram}M" if alone else arguments.cache_ram)


def _daily_bytes(text: str) -> int | None:
    return None if text == "0" else parse_bytes(text)
