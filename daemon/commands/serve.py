"""`qwend serve`: serves a model until a signal comes. Main thread."""

import argparse
import json
from typing import Any

from daemon import __version__
from daemon.commands.flags import add_cache_flags, add_model_flags, add_server_flags, config_of
from daemon.config import Config


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("serve", help="serve a model over the OpenAI API")
    add_model_flags(parser)
    add_server_flags(parser)
    add_cache_flags(parser)
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
    with bind(config.server.host, config.server.port) as listener, assemble(config) as daemon:
        info = daemon.engine.info
        server = Server(
            daemon.app(), lambda url: _announce(url, info.model_name, info.backend, config)
        )
        daemon.engine.when_failed(server.stop)
        server.serve_on(listener)
        if daemon.engine.failure is not None:
            raise daemon.engine.failure


def _announce(url: str, model: str, backend: str, config: Config) -> None:
    if config.model.path is None:
        print("No --model given: serving the embedded tiny-coder (15 M), for trying things out.")
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]})
    cache = f"checkpoints in {config.cache.folder}" if config.cache.enabled else "no checkpoints"
    print(f"qwend {__version__} serves {model} at {url}/v1 on {backend} ({cache})")
    print(f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"Or:  qwend chat --url {url}", flush=True)
