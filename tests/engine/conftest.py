"""One loaded tiny-coder for all engine tests, and a harness that runs requests to their end."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_harness import EngineHarness

from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape

VECTORS = Path(__file__).parents[1] / "vectors" / "tiny-coder"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(VECTORS / "golden.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def load_tiny_coder() -> Callable[[], Model]:
    file = open_gguf(VECTORS / "tiny-coder-BF16.gguf")

    def load() -> Model:
        backend = NumpyBackend(model_shape(file).rms_eps)
        return load_model(file, backend)

    return load


@pytest.fixture(scope="session")
def tiny_coder(load_tiny_coder: Callable[[], Model]) -> Model:
    return load_tiny_coder()


@pytest.fixture
def harness(tiny_coder: Model) -> EngineHarness:
    return EngineHarness(tiny_coder)
