"""`qwend serve`: serves a model until a signal comes. Main thread."""

import argparse
import gc
import json
import sys
from typing import Any

from daemon import __version__
from daemon.commands.access_flags import add_access_flags
from daemon.commands.flags import add_cache_flags, add_model_flags, add_server_flags, config_of
from daemon.commands.llama_flags import add_llama_flags
from daemon.commands.reply_flags import add_reply_flags
from daemon.config import Config

SWITCH_INTERVAL_S = 2e-4
"""How long another thread may hold the interpreter when the engine's wants it: between two steps of
the GPU, Python's usual 5 ms would be most of a step."""


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "serve", help="serve a model over HTTP", allow_abbrev=False,
        epilog="llama-server's other flags are accepted without effect, and said so, or refused.",
    )  # fmt: skip
    add_model_flags(parser)
    add_server_flags(parser)
    add_access_flags(parser)
    add_reply_flags(parser)
    add_cache_flags(parser)
    add_llama_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        EngineStopped: the engine has failed; the store is closed in good order all the same.
    """
    from daemon.api.server import Server, bind
    from daemon.assemble import assemble
    from daemon.logs import configure_logs

    config = config_of(arguments)
    configure_logs()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    for note in arguments.notes:
        print(f"Note: {note}.", file=sys.stderr)
    with bind(config.server.host, config.server.port) as listener, assemble(config) as daemon:
        info = daemon.engine.info
        server = Server(
            daemon.app(), lambda url: _announce(url, info.model_name, info.backend, config)
        )
        daemon.engine.when_failed(server.stop)
        # What was built until here stays: looking through it for garbage takes tens of ms.
        gc.freeze()
        server.serve_on(listener)
        if server.force_exit:
            daemon.grace_s = 0
        if daemon.engine.failure is not None:
            raise daemon.engine.failure


def _announce(url: str, model: str, backend: str, config: Config) -> None:
    if config.model.path is None:
        print("No --model given: serving the embedded tiny-coder (15 M), for trying things out.")
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]})
    cache = f"checkpoints in {config.cache.folder}" if config.cache.enabled else "no checkpoints"
    print(f"qwend {__version__} serves {model} at {url}/v1 on {backend} ({cache})")
    keyed = bool(config.server.api_keys)
    header = "-H 'Authorization: Bearer KEY' " if keyed else ""
    json_type = "-H 'Content-Type: application/json'"
    print(f"Try: curl {url}/v1/chat/completions {header}{json_type} -d '{body}'")
    print(f"Or:  qwend connect AGENT --url {url}, for codex, claude-code, opencode and others")
    print(f"Or:  qwend chat --url {url}{' --api-key KEY' if keyed else ''}", flush=True)
