"""A device and a compiler for tests marked gpu; cuda-python is imported only when one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from daemon.kernels.runtime.compiler import Compiler
    from daemon.kernels.runtime.device import Device


@pytest.fixture(scope="session")
def device() -> Device:
    from daemon.kernels.runtime.device import Device

    return Device.open()


@pytest.fixture(scope="session")
def compiler(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    from daemon.kernels.runtime.compiler import Compiler

    return Compiler(device.arch, tmp_path_factory.mktemp("cubins"))
