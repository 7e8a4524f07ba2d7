"""How each agent is installed here, pointed at a server and driven without a person."""

import json
from dataclasses import dataclass
from pathlib import Path

from scripted_coder import Shell

CLIENTS = Path(__file__).parents[2] / ".agents"
NODE = CLIENTS / "node_modules" / ".bin"
AIDER = CLIENTS / "aider" / "bin" / "aider"
MODEL = "tiny-coder"
CONTEXT = 131_072


@dataclass(frozen=True)
class Workplace:
    """A home folder of its own, a repository in it, and the server's address."""

    home: Path
    repository: Path
    url: str


@dataclass(frozen=True)
class Agent:
    """An agent: `first` and `next` are command lines, to which the task is appended."""

    name: str
    path: str
    shell: Shell | None
    program: Path
    first: tuple[str, ...]
    next: tuple[str, ...]

    def configure(self, place: Workplace) -> dict[str, str]:
        """Write what the agent reads; its environment."""
        return _CONFIGURE[self.name](place)


def _qwen_code(place: Workplace) -> dict[str, str]:
    return {
        "OPENAI_BASE_URL": f"{place.url}/v1",
        "OPENAI_API_KEY": "none",
        "OPENAI_MODEL": MODEL,
    }


def _codex(place: Workplace) -> dict[str, str]:
    folder = place.home / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(
        f'model = "{MODEL}"\nmodel_provider = "qwend"\nmodel_context_window = {CONTEXT}\n'
        f'[model_providers.qwend]\nname = "qwend"\nbase_url = "{place.url}/v1"\n'
        'wire_api = "responses"\n'
    )
    return {}


def _claude_code(place: Workplace) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


def _opencode(place: Workplace) -> dict[str, str]:
    limit = {"context": CONTEXT, "output": 8192}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{place.url}/v1", "apiKey": "none"},
        "models": {MODEL: {"limit": limit}},
    }
    settings = {
        "model": f"qwend/{MODEL}",
        "autoupdate": False,
        "share": "disabled",
        "provider": {"qwend": provider},
    }
    (place.repository / "opencode.json").write_text(json.dumps(settings))
    return {}


def _aider(place: Workplace) -> dict[str, str]:
    return {"OPENAI_API_BASE": f"{place.url}/v1", "OPENAI_API_KEY": "none"}


_CONFIGURE = {
    "qwen-code": _qwen_code,
    "codex": _codex,
    "claude-code": _claude_code,
    "opencode": _opencode,
    "aider": _aider,
}

_QWEN = ("--auth-type", "openai", "--yolo")
_CODEX = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
_AIDER = (
    "--model", f"openai/{MODEL}", "--edit-format", "diff", "--yes-always", "--no-check-update",
    "--no-show-model-warnings", "--no-gitignore", "--no-auto-commits", "--restore-chat-history",
    "--analytics-disable", "calc.py", "--message",
)  # fmt: skip

AGENTS = (
    Agent(
        "qwen-code",
        "/v1/chat/completions",
        Shell("run_shell_command", "command", (("is_background", False),)),
        NODE / "qwen",
        (*_QWEN, "-p"),
        (*_QWEN, "--continue", "-p"),
    ),
    Agent(
        "codex",
        "/v1/responses",
        Shell("exec_command", "cmd"),
        NODE / "codex",
        ("exec", *_CODEX),
        ("exec", "resume", "--last", *_CODEX),
    ),
    Agent(
        "claude-code",
        "/v1/messages",
        Shell("Bash", "command", (("description", "A step."),)),
        NODE / "claude",
        ("-p", "--allowedTools=Bash"),
        ("-c", "-p", "--allowedTools=Bash"),
    ),
    Agent(
        "opencode",
        "/v1/chat/completions",
        Shell("bash", "command", (("description", "A step."),)),
        NODE / "opencode",
        ("run",),
        ("run", "--continue"),
    ),
    Agent("aider", "/v1/chat/completions", None, AIDER, _AIDER, _AIDER),
)
