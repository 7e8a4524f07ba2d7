"""What coding agents must be told about a qwend server, each in its own configuration.

Owns the agents' files and names of settings. Pure: reads and writes nothing. A limit is never left
to an agent's guess, since several take this model's name for one with a million tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

KEY_VARIABLE = "QWEND_API_KEY"
NO_KEY = "none"
"""Sent where the server asks for no key, since agents insist on one."""


class Endpoint(Struct, frozen=True, kw_only=True):
    """One server. `url` is its root, without /v1; `context_length` in tokens."""

    url: str
    model: str
    context_length: int
    api_key: str = ""

    @property
    def key(self) -> str:
        """What agents send."""
        return self.api_key or NO_KEY

    @property
    def max_output(self) -> int:
        """Tokens of one reply: a quarter of the context, 32K at most."""
        return min(self.context_length // 4, 32_768)

    @property
    def compact_at(self) -> int:
        """Tokens of a conversation at which it must become shorter: a reply still fits."""
        return self.context_length - self.max_output - max(self.context_length // 32, 256)


class Entry(Struct, frozen=True):
    """One element of a list, which replaces the one that has the same value under `key`."""

    key: str
    content: Mapping[str, Any]


class Default(Struct, frozen=True):
    """A value for a file that has none there."""

    value: Any


class FileSettings(Struct, frozen=True):
    """What belongs into one file. The first of `paths` that exists is meant, else the first."""

    paths: tuple[str, ...]
    settings: Mapping[str, Any]


class Agent(Struct, frozen=True):
    """`start` is what to type then; `note` what no file can say."""

    files: Callable[[Endpoint], tuple[FileSettings, ...]]
    start: str
    note: Callable[[Endpoint], str] = lambda endpoint: ""


def _qwen_code(at: Endpoint) -> tuple[FileSettings, ...]:
    provider = {
        "id": at.model,
        "name": f"{at.model} (qwend)",
        "baseUrl": f"{at.url}/v1",
        "envKey": KEY_VARIABLE,
        "generationConfig": {
            "contextWindowSize": at.context_length,
            "timeout": 600_000,
            "samplingParams": {"max_tokens": at.max_output},
        },
    }
    share = round(at.compact_at / at.context_length, 2)
    settings = {
        "env": {KEY_VARIABLE: at.key},
        "modelProviders": {"openai": Entry("id", provider)},
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": at.model, "chatCompression": {"contextPercentageThreshold": share}},
    }
    return (FileSettings(("~/.qwen/settings.json",), settings),)


def _codex(at: Endpoint) -> tuple[FileSettings, ...]:
    provider = {"name": "qwend", "base_url": f"{at.url}/v1", "wire_api": "responses"}
    if at.api_key:
        provider["env_key"] = KEY_VARIABLE
    settings = {
        "model": at.model,
        "model_provider": "qwend",
        "model_context_window": at.context_length,
        "model_auto_compact_token_limit": at.compact_at,
        "model_providers": {"qwend": provider},
    }
    return (FileSettings(("~/.codex/config.toml",), settings),)


def _opencode(at: Endpoint) -> tuple[FileSettings, ...]:
    model = {
        "name": at.model,
        "reasoning": True,
        "tool_call": True,
        "interleaved": {"field": "reasoning_content"},
        "limit": {"context": at.context_length, "output": at.max_output},
    }
    settings = {
        "$schema": Default("https://opencode.ai/config.json"),
        "model": f"qwend/{at.model}",
        "small_model": f"qwend/{at.model}",
        "compaction": {"auto": True, "reserved": at.context_length - at.compact_at},
        "provider": {
            "qwend": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "qwend",
                "options": {"baseURL": f"{at.url}/v1", "apiKey": at.key},
                "models": {at.model: model},
            }
        },
    }
    names = ("opencode.json", "opencode.jsonc", "config.json")
    return (FileSettings(tuple(f"~/.config/opencode/{name}" for name in names), settings),)


def _claude_code(at: Endpoint) -> tuple[FileSettings, ...]:
    """It takes any window under 100,000 tokens for one of 100,000: hence the percentage."""
    window = min(max(at.context_length, 100_000), 200_000)
    usable = window - min(at.max_output, 20_000)
    kinds = ("OPUS", "SONNET", "HAIKU")
    names = [f"ANTHROPIC_DEFAULT_{kind}_MODEL" for kind in kinds]
    names += ["ANTHROPIC_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL"]
    env = {
        "ANTHROPIC_BASE_URL": at.url,
        "ANTHROPIC_AUTH_TOKEN": at.key,
        **dict.fromkeys(names, at.model),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(at.max_output),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(window),
        "CLAUDE_AUTOCOMPACT_PCT_OVERRIDE": str(max(1, min(95, 100 * at.compact_at // usable))),
        # A hash in the first line of the system prompt would begin every prompt anew.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "API_TIMEOUT_MS": "3000000",
    }
    return (FileSettings(("~/.claude/settings.json",), {"env": env}),)


def _aider(at: Endpoint) -> tuple[FileSettings, ...]:
    name = f"openai/{at.model}"
    options = {
        "model": name,
        "openai-api-base": f"{at.url}/v1",
        "openai-api-key": at.key,
        "max-chat-history-tokens": at.compact_at // 2,
    }
    facts = {
        "litellm_provider": "openai",
        "mode": "chat",
        "max_input_tokens": at.context_length,
        "max_output_tokens": at.max_output,
        "max_tokens": at.max_output,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
    }
    return (
        FileSettings(("~/.aider.conf.yml",), options),
        FileSettings(("~/.aider.model.metadata.json",), {name: facts}),
    )


def _cline(at: Endpoint) -> tuple[FileSettings, ...]:
    settings = {
        "provider": "openai-compatible",
        "apiKey": at.key,
        "model": at.model,
        "baseUrl": f"{at.url}/v1",
        "maxTokens": at.max_output,
        "contextWindow": at.context_length,
    }
    entry = {"settings": settings, "updatedAt": "2026-01-01T00:00:00.000Z", "tokenSource": "manual"}
    content = {
        "version": Default(1),
        "lastUsedProvider": "openai-compatible",
        "modes": {},
        "providers": {"openai-compatible": entry},
    }
    return (FileSettings(("~/.cline/data/settings/providers.json",), content),)


def _continue(at: Endpoint) -> tuple[FileSettings, ...]:
    model = {
        "name": "qwend",
        "provider": "openai",
        "model": at.model,
        "apiBase": f"{at.url}/v1",
        "apiKey": at.key,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
        "defaultCompletionOptions": {
            "contextLength": at.context_length,
            "maxTokens": at.max_output,
        },
    }
    head = {"name": "Local Config", "version": "1.0.0", "schema": "v1"}
    missing = {key: Default(value) for key, value in head.items()}
    settings = {**missing, "models": Entry("name", model)}
    return (FileSettings(("~/.continue/config.yaml",), settings),)


def _export(at: Endpoint) -> str:
    return f"It reads the key from the environment: export {KEY_VARIABLE}=…" if at.api_key else ""


def _cline_in_an_editor(at: Endpoint) -> str:
    return (
        "The VS Code extension keeps its settings to itself: choose “OpenAI Compatible” there, "
        f"with {at.url}/v1, {at.model}, and a context window of {at.context_length}."
    )


AGENTS: Mapping[str, Agent] = {
    "qwen-code": Agent(_qwen_code, "qwen"),
    "codex": Agent(_codex, "codex", _export),
    "opencode": Agent(_opencode, "opencode"),
    "claude-code": Agent(_claude_code, "claude"),
    "aider": Agent(_aider, "aider"),
    "cline": Agent(_cline, "cline", _cline_in_an_editor),
    "continue": Agent(_continue, "a reload of the editor's window"),
}


def path_of(file: FileSettings, home: Path) -> Path:
    """The file that is there, or the one to make."""
    paths = [home / path.removeprefix("~/") for path in file.paths]
    return next((path for path in paths if path.exists()), paths[0])
