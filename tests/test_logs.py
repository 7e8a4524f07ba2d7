"""The log's form: one line a request, uvicorn's records through the same handler."""

import io
import logging
from collections.abc import Iterator

import msgspec
import pytest

from daemon.logs import configure_logs, log_request, request_line
from daemon.metrics import RequestRecord

RECORD = RequestRecord(
    id="abc",
    model="tiny-coder",
    session="secret question",
    num_prompt_tokens=1500,
    num_cached_tokens=1344,
    num_evaluated_tokens=156,
    num_generated_tokens=50,
    prompt_ms=104.4,
    decode_ms=250.0,
    finish="tool_calls",
    queue_ms=6.6,
)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_request_line() -> None:
    assert request_line(RECORD) == (
        "abc tiny-coder prompt=1500 cached=1344 generated=50 queue_ms=7 prompt_ms=104 tok/s=200.0"
        " finish=tool_calls"
    )


def test_lost_tokens_are_named_with_their_cause() -> None:
    record = msgspec.structs.replace(RECORD, num_lost_tokens=90, cause="client_edit")
    assert request_line(record).endswith("finish=tool_calls lost=90 cause=client_edit")


def test_one_line_a_request_without_its_text(log: io.StringIO) -> None:
    log_request(RECORD)
    [line] = log.getvalue().splitlines()
    assert line.endswith(request_line(RECORD))
    assert "secret" not in line


def test_uvicorn_goes_through_the_same_handler(log: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").error("Broken pipe")
    [line] = log.getvalue().splitlines()
    assert line.endswith("ERROR   Broken pipe")
