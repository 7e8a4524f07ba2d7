"""Lets schemathesis look for a request that the server answers with an error of its own.

    pip install schemathesis
    PYTHONPATH=tests:tests/api python -m benchmarks.api_fuzz [--examples 40] [--seed 1]

It reads /openapi.json and sends what that allows, and what it nearly allows, to every operation
of the application over a scripted engine, which keeps to each request's constraint. Any answer of
500 is a finding, and the exit status 1. The slot actions of llama-server, which are refused as
not implemented (501), are left out.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fakes import RememberedReplies, Script
from http_harness import serving
from scripted_app import scripted_engine, scripted_service, text_side

from daemon.api.app import create_app

REPLY = "Hm.\n</think>\n\nHello."


def main(arguments: Sequence[str] | None = None) -> int:
    """schemathesis's own exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=40, help="cases an operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    beside = Path(sys.executable).with_name("schemathesis")
    program = str(beside) if beside.exists() else shutil.which("schemathesis")
    if program is None:
        parser.error("schemathesis is not installed: pip install schemathesis")
    text = text_side()
    tokens = text.tokenizer.encode(REPLY)
    engine = scripted_engine(text, lambda _: Script(tokens, obedient=True))
    app = create_app(scripted_service(text, engine, RememberedReplies(), None))
    try:
        with serving(app) as url:
            command = [program, "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
            command += ["--exclude-path-regex", "^/slots/", "--seed", str(options.seed)]
            command += ["--max-examples", str(options.examples), "--no-color"]
            return subprocess.run(command, check=False).returncode
    finally:
        engine.stop()
        text.constrainer.close()


if __name__ == "__main__":
    sys.exit(main())
