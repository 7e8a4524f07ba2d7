"""Which device computes: a GPU that is there is used or refused, never passed over."""

from pathlib import Path

import pytest
from tensor_tables import tensor_table

from daemon import devices
from daemon.config import EngineConfig
from daemon.devices import (
    has_driver,
    make_backend,
    pinned_bytes,
    plan_memory,
    prefill_tokens,
    uses_gpu,
)
from daemon.engine.memory.memory_plan import MemoryDemand
from daemon.engine.weights.loader import model_shape
from daemon.errors import ConfigError, NoDevice

DEMAND = MemoryDemand(context_length=1024, num_sequences=2, num_slots=8)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver's file, of a driver that does not start."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "NVIDIA_DRIVERS", (tmp_path / "nvidiactl",))


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "NVIDIA_DRIVERS", (tmp_path / "nothing",))


def make(config: EngineConfig) -> object:
    file = tensor_table("tiny-dense")
    return make_backend(config, file, model_shape(file), DEMAND)


def test_auto_takes_the_gpu_where_there_is_a_driver(driver: None) -> None:
    assert has_driver()
    assert uses_gpu(EngineConfig())
    assert not uses_gpu(EngineConfig(device="cpu"))
    assert prefill_tokens(EngineConfig()) > prefill_tokens(EngineConfig(device="cpu"))


def test_auto_takes_the_cpu_where_there_is_none(no_driver: None) -> None:
    assert not uses_gpu(EngineConfig())
    assert uses_gpu(EngineConfig(device="cuda"))
    assert type(make(EngineConfig())).__name__ == "NumpyBackend"


def test_a_gpu_that_cannot_be_used_is_no_reason_for_the_cpu(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")

    def fail() -> None:
        raise NoDevice("the driver is too old")

    monkeypatch.setattr("daemon.kernels.runtime.device.start_driver", fail)
    for config in (EngineConfig(), EngineConfig(device="cuda")):
        with pytest.raises(NoDevice, match="too old"):
            make(config)
    with pytest.raises(NoDevice, match="too old"):
        plan_memory(EngineConfig(), tensor_table("tiny-dense"), DEMAND)


def test_a_gpu_without_its_extra_says_how_to_install_it(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(NoDevice, match=r"pip install 'qwend\[cuda\]'"):
        make(EngineConfig())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"key_format": "q8_0"}, "KV cache formats are the GPU's"),
        ({"gpu_memory_bytes": 2**30}, "--gpu-memory is the GPU's"),
    ],
)
def test_the_gpus_settings_are_refused_on_the_cpu(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(EngineConfig(device="cpu", **settings))  # type: ignore[arg-type]


def test_more_sequences_than_the_gpu_takes(driver: None) -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(ConfigError, match="--parallel 17"):
        make(EngineConfig(parallel=17))


@pytest.mark.parametrize(
    ("memory_gib", "checkpoint_gib", "pinned_gib"),
    [(64, 8, 10), (16, 2, 3), (64, 0, 2), (64, 60, 32), (64, None, 0)],
)
def test_as_much_is_pinned_as_checkpoints_may_take(
    monkeypatch: pytest.MonkeyPatch, memory_gib: int, checkpoint_gib: int | None, pinned_gib: int
) -> None:
    monkeypatch.setattr(devices, "_host_bytes", lambda _: memory_gib * 2**30)
    checkpoint_bytes = None if checkpoint_gib is None else checkpoint_gib * 2**30
    assert pinned_bytes(checkpoint_bytes) == pinned_gib * 2**30
