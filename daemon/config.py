"""Every setting, each part's in its own frozen section; the one place that reads the environment.

Made by cli.py from flags; only assemble.py sees all sections.
"""

import os
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from daemon.errors import ConfigError

DEFAULT_CONTEXT = 32_768
DEFAULT_PORT = 8080


class ModelConfig(Struct, frozen=True, kw_only=True):
    """Which model. No path: the embedded one. `alias` is the name that clients use."""

    path: Path | None = None
    alias: str | None = None
    chat_template_file: Path | None = None


class EngineConfig(Struct, frozen=True, kw_only=True):
    """`context` None: the model's own, at most DEFAULT_CONTEXT; 0: all of it.

    `canonical`: evaluate replies again as prompts while nothing else is to be done.

    `device` "auto" takes the GPU where there is one. `key_format` and `value_format` are how the
    GPU keeps the KV cache; the CPU keeps float32. `gpu_memory_bytes` is the most that all of qwend
    may take on the GPU, CUDA's own part included; None is what is free.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    context: int | None = None
    parallel: int = 4
    max_waiting: int = 64
    strict: bool = False
    canonical: bool = True
    key_format: str = "bf16"
    value_format: str = "bf16"
    gpu_memory_bytes: int | None = None


class CacheConfig(Struct, frozen=True, kw_only=True):
    """The checkpoint store.

    `interval_tokens` is the spacing inside a long prompt, None: by what a state takes.
    `memory_bytes` of payloads stay in memory beside the disk, `daily_bytes` may be written to it in
    a day, and what is superseded soon, as a rule, waits `write_delay_s` before; at the end, what
    waits is written for `stop_grace_s`. `audit_share` is the share of resumed requests that are
    evaluated again, cold, when the device is idle.
    `normalise` names the rules that take noise out of conversations.
    """

    enabled: bool = True
    folder: Path
    budget_bytes: int = 20 * 2**30
    interval_tokens: int | None = None
    memory_bytes: int = 0
    daily_bytes: int | None = None
    write_delay_s: float = 10.0
    stop_grace_s: float = 10.0
    audit_share: float = 0.0
    normalise: str = "safe"


class ServerConfig(Struct, frozen=True, kw_only=True):
    """Where to listen, and to whom. `is_local`: only this machine can reach it.

    `allowed_hosts` are further names of the server, `cors_origins` pages that may ask from a
    browser. Limits are a key's; None: none. `log_prompts` writes text into the log. A request that
    waits or takes longer than its time-outs is ended; None: never.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_keys: tuple[str, ...] = ()
    is_local: bool = True
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    parallel_requests: int | None = None
    log_prompts: bool = False
    queue_timeout_s: float | None = 600.0
    request_timeout_s: float | None = None


class ReplyConfig(Struct, frozen=True, kw_only=True):
    """What a request does not say; None: what the model's file recommends, or no limit.

    `template_options` are variables of the chat template.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    thinking_budget: int | None = None
    reasoning_effort: str | None = None
    template_options: dict[str, Any] = {}


class Config(Struct, frozen=True, kw_only=True):
    """All sections."""

    model: ModelConfig
    engine: EngineConfig
    cache: CacheConfig
    server: ServerConfig = ServerConfig()
    reply: ReplyConfig = ReplyConfig()


def default_cache_memory() -> int:
    """Host memory that checkpoints may take beside the disk: an eighth of it all, at most 8 GiB."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8, 8 * 2**30)


def default_cache_folder() -> Path:
    """Where checkpoints are kept."""
    return _user_cache() / "checkpoints"


def kernel_cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return _user_cache() / "kernels"


def _user_cache() -> Path:
    """`qwend/` in the user's cache folder, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qwend"


def keys_of_environment() -> tuple[str, ...]:
    """API keys in QWEND_API_KEY, or in llama-server's LLAMA_API_KEY, with commas between them."""
    given = os.environ.get("QWEND_API_KEY") or os.environ.get("LLAMA_API_KEY") or ""
    return tuple(key for part in given.split(",") if (key := part.strip()))


def parse_bytes(text: str) -> int:
    """`20G`, `500M`, `1.5T`, `4096`: a number of bytes, in powers of 1024.

    Raises:
        ConfigError: it is none.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in units else ""
    try:
        value = float(number.removesuffix(unit))
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{text!r} is no size; write for example 20G or 500M")
    return int(value * units[unit])
