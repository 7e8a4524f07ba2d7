"""The form of the log: one line an event, one line a request; text only where it is asked for.

Owns the format and who may speak. Knows nothing of HTTP or the engine; any thread may log.
"""

import json
import logging
import sys
from typing import TextIO

from daemon.metrics import RequestRecord

_requests = logging.getLogger("daemon.requests")


def configure_logs(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send every record, uvicorn's too, to one handler. Call once, before serving.

    Other libraries are heard from WARNING on.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("daemon").setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def request_line(record: RequestRecord) -> str:
    """A request in one line: what was asked in tokens, what was reused, how fast, how it ended."""
    seconds = record.decode_ms / 1000
    speed = f"{record.num_generated_tokens / seconds:.1f}" if seconds > 0 else "-"
    queue_ms = "-" if record.queue_ms is None else f"{record.queue_ms:.0f}"
    lost = f" lost={record.num_lost_tokens} cause={record.cause}" if record.num_lost_tokens else ""
    return (
        f"{record.id} {record.model} prompt={record.num_prompt_tokens}"
        f" cached={record.num_cached_tokens} generated={record.num_generated_tokens}"
        f" queue_ms={queue_ms} prompt_ms={record.prompt_ms:.0f} tok/s={speed}"
        f" finish={record.finish}{lost}"
    )


def log_request(record: RequestRecord) -> None:
    """Log a request that has ended."""
    _requests.info("%s", request_line(record))


def log_text(request_id: str, what: str, text: str) -> None:
    """Log a prompt or a reply in full, as one line of JSON; called only with --log-prompts."""
    _requests.info("%s %s=%s", request_id, what, json.dumps(text, ensure_ascii=False))
