"""Makes tests/ importable, so that every folder's tests find `fakes`; a driver without a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fake_driver import FakeDriver


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The runtime calls it instead of CUDA."""
    pytest.importorskip("cuda.core")
    from fake_driver import install_fake_driver

    return install_fake_driver(monkeypatch)
