"""Makes tests/ importable, so that every folder's tests find `fakes`; a driver without a card.

No property test looks at the time that an example takes.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fake_driver import FakeDriver

settings.register_profile("qwend", deadline=None)
settings.load_profile("qwend")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a card's tests may be told on the command line."""
    parser.addoption("--serve", default="", help="more flags of `qwend serve`, for tests of kills")


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """The runtime calls it instead of CUDA. What was taken from it is given back to it."""
    pytest.importorskip("cuda.core")
    from fake_driver import install_fake_driver

    yield install_fake_driver(monkeypatch)
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "pinning":
            # One that has only just begun would call the real driver.
            thread.join(5)
