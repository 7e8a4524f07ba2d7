"""Flags that say who may ask: keys, names, pages, limits; and what they come to.

Owns the rule that nobody listens beyond this machine without a key by accident. Main thread.
"""

import argparse
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daemon.commands.number_flags import positive
from daemon.config import keys_of_environment
from daemon.errors import ConfigError


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Who may ask, and how much."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="a key that clients must send; several with commas. Better in a file or in the "
        "environment as QWEND_API_KEY: other users of the machine see the command line",
    )  # fmt: skip
    group.add_argument("--api-key-file", type=Path, help="keys, one a line; # begins a comment")
    group.add_argument(
        "--without-api-key", action="store_true",
        help="listen beyond this machine and let everybody in who can reach it",
    )  # fmt: skip
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="another name of this server, beside localhost, for requests without a key",
    )  # fmt: skip
    group.add_argument(
        "--cors-origin", "--cors-origins", action="append", default=[], metavar="ORIGIN",
        help="let pages of ORIGIN ask from a browser, * for all (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--requests-per-minute", type=positive, metavar="N", help="of one key (default: no limit)"
    )
    group.add_argument(
        "--requests-per-key", type=positive, metavar="N",
        help="of one key at the same time (default: no limit)",
    )  # fmt: skip
    group.add_argument(
        "--log-prompts", action="store_true",
        help="write the text of prompts and replies into the log (default: no text at all)",
    )  # fmt: skip


def access_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part of ServerConfig that says who may ask.

    Raises:
        ConfigError: a key file that cannot be read, or an address that needs keys without any.
    """
    keys = _keys(arguments)
    if not (keys or arguments.without_api_key or is_local(arguments.host)):
        raise ConfigError(
            f"--host {arguments.host} lets other machines in: set keys with --api-key-file or "
            "QWEND_API_KEY, or pass --without-api-key to let everybody in"
        )
    return {
        "api_keys": keys,
        "is_local": is_local(arguments.host),
        "allowed_hosts": tuple(arguments.allowed_host),
        "cors_origins": tuple(origin.rstrip("/") for origin in _listed(arguments.cors_origin)),
        "requests_per_minute": arguments.requests_per_minute,
        "parallel_requests": arguments.requests_per_key,
        "log_prompts": arguments.log_prompts,
    }


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address; a name that is none counts as local.

    Binding it will say what is wrong with it.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found
    )


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    given = _listed(arguments.api_key)
    if arguments.api_key_file is not None:
        given += _keys_of_file(arguments.api_key_file)
    keys = tuple(dict.fromkeys(key.strip() for key in given if key.strip()))
    return keys or keys_of_environment()


def _listed(given: Sequence[str]) -> list[str]:
    """Values of a flag that may be repeated, or have several with commas between them."""
    return [value.strip() for part in given for value in part.split(",")]


def _keys_of_file(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: {error}") from error
    keys = [key for line in lines if (key := line.partition("#")[0].strip())]
    if not keys:
        raise ConfigError(f"--api-key-file {path}: has no key in it")
    return keys
