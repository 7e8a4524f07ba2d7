"""What is planned on paper is what loading takes, to the byte: on a driver without a card."""

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import FakeDriver
from msgspec.structs import replace

from benchmarks.make_model import make_model
from benchmarks.model_sizes import TINY_DENSE, TINY_MOE
from daemon.config import EngineConfig
from daemon.devices import make_backend, memory_budget, plan_memory
from daemon.engine.backends.cuda_backend import CudaBackend
from daemon.engine.backends.cuda_memory import CudaLimits
from daemon.engine.backends.cuda_plan import memory_needs
from daemon.engine.memory.memory_plan import (
    MARGIN_BYTES,
    PAGES,
    STATES,
    WEIGHTS,
    MemoryDemand,
    MemoryPlan,
)
from daemon.engine.weights.gguf import GGUFFile, open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.errors import KernelCompileError, OutOfDeviceMemory
from daemon.kernels.runtime.compiler import Compiler, Cubin
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.paper_device import card_of

DEMAND = MemoryDemand(context_length=1000, num_sequences=2, num_slots=6)


class NothingCompiled(Compiler):
    """Machine code that the fake driver is content with."""

    def cubin(self, source: Path, defines: object = None) -> Cubin:
        done: Future[bytes] = Future()
        done.set_result(b"machine code")
        return Cubin(done)


def planned_backend(file: GGUFFile) -> tuple[Device, MemoryPlan, CudaBackend]:
    device, limits = Device.open(), CudaLimits(context_length=DEMAND.context_length)
    needs = memory_needs(file, card_of(device), limits, DEMAND.num_slots)
    budget = memory_budget(device.free_bytes(), None)
    plan = MemoryPlan(card="fake", demand=DEMAND, needs=needs, budget_bytes=budget)
    compiler = NothingCompiled(device.arch, None)
    return device, plan, CudaBackend(device, compiler, limits, model_shape(file).rms_eps, plan)


@pytest.fixture(params=[TINY_DENSE, TINY_MOE], ids=["dense", "experts"])
def model_file(tmp_path: Path, request: pytest.FixtureRequest) -> GGUFFile:
    make_model(tmp_path / "tiny.gguf", replace(request.param, vocab=1024), "q4_k_m")
    return open_gguf(tmp_path / "tiny.gguf")


def test_loading_takes_what_was_planned(fake_driver: FakeDriver, model_file: GGUFFile) -> None:
    before = fake_driver.free_bytes
    device, plan, backend = planned_backend(model_file)
    reserved = before - fake_driver.free_bytes
    assert reserved == sum(-(-size // 256) * 256 for size in plan.regions.values())
    model = load_model(model_file, backend)
    backend.allocate(model.shape, DEMAND.num_slots, plan.num_pages)
    assert before - fake_driver.free_bytes == reserved
    for region in (WEIGHTS, STATES, PAGES):
        assert device.used_bytes_of(region) == plan.regions[region]
    # The workspace is as large as the buffers that weights land in, whichever needs more.
    assert device.used_bytes_of("workspace") <= plan.regions["workspace"]
    # A second life of the same backend, such as another context, begins in the same place.
    backend.allocate(model.shape, 2, 3)
    assert before - fake_driver.free_bytes == reserved


def test_the_embedding_arrives_as_it_is_in_the_file(
    fake_driver: FakeDriver, model_file: GGUFFile
) -> None:
    device, _, backend = planned_backend(model_file)
    model = load_model(model_file, backend)
    backend.allocate(model.shape, 1, 1)
    embedding = model.weights.embedding
    assert fake_driver.launched["quant_pack"] > 20
    if "output.weight" not in model_file.tensors:
        assert embedding.rows is model.weights.head.gemv.matrix.segments[0].tiles
        return
    expected = model_file.tensors["token_embd.weight"].data
    np.testing.assert_array_equal(device.to_host(embedding.rows).reshape(-1), expected)


def test_states_and_pages_come_back_as_they_went(
    fake_driver: FakeDriver, model_file: GGUFFile
) -> None:
    _, _, backend = planned_backend(model_file)
    model = load_model(model_file, backend)
    backend.allocate(model.shape, 3, 4)
    rng = np.random.default_rng(5)
    backend.clear_slot(0)
    empty, [old] = backend.begin_read(0, [3]).result()
    assert not any(empty)
    state = rng.integers(0, 256, len(empty), dtype=np.uint8).tobytes()
    pages = {page: rng.integers(0, 256, len(old), dtype=np.uint8).tobytes() for page in (1, 3)}
    backend.begin_write(1, state, pages)
    backend.copy_slot(1, 2)
    # Back out, in buffers of the pool where they are ready, and in again from there.
    kept, contents = backend.begin_read(2, [3, 1]).result()
    assert (kept, contents) == (state, [pages[3], pages[1]])
    backend.begin_write(0, kept, {0: contents[0]})
    assert backend.begin_read(0, [0]).result() == (state, [pages[3]])


@pytest.mark.parametrize(
    ("free", "cap", "budget"),
    [
        (None, None, None),
        (10 * 2**30, None, 10 * 2**30 - 2**28),
        (None, 24 * 2**30, 24 * 2**30 - 2**29 - 2**28),
        (10 * 2**30, 4 * 2**30, 4 * 2**30 - 2**29 - 2**28),
        (10 * 2**30, 80 * 2**30, 10 * 2**30 - 2**28),
    ],
)
def test_the_budget_is_the_less_of_what_is_free_and_what_is_allowed(
    free: int | None, cap: int | None, budget: int | None
) -> None:
    assert memory_budget(free, cap) == budget


def test_a_kernel_that_does_not_compile_is_told_before_the_first_request(
    fake_driver: FakeDriver, model_file: GGUFFile
) -> None:
    class Broken(NothingCompiled):
        def finish(self) -> None:
            raise KernelCompileError("quant_gemm.cu does not compile for sm_90a: error")

    device = Device.open()
    backend = CudaBackend(device, Broken(device.arch, None), CudaLimits(context_length=64), 1e-6)
    model = load_model(model_file, backend)
    with pytest.raises(KernelCompileError, match=r"quant_gemm\.cu"):
        backend.allocate(model.shape, 1, 1)


def test_a_card_that_is_too_full_is_refused_before_anything_is_loaded(
    fake_driver: FakeDriver, model_file: GGUFFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "nvidiactl"
    driver.touch()
    monkeypatch.setattr("daemon.devices.NVIDIA_DRIVERS", (driver,))
    fake_driver.free_bytes = 430 * 2**20
    shape, config = model_shape(model_file), EngineConfig(key_format="q8_0")
    demand = MemoryDemand(context_length=32_768, num_sequences=16, num_slots=36)
    with pytest.raises(OutOfDeviceMemory, match=r"32768 tokens does not fit Fake 9000.* would fit"):
        make_backend(config, model_file, shape, demand)
    assert fake_driver.free_bytes == 430 * 2**20
    plan = plan_memory(config, model_file, demand)
    assert plan.card == "Fake 9000"
    assert plan.budget_bytes == 430 * 2**20 - MARGIN_BYTES
    smaller = MemoryDemand(context_length=plan.fitting_tokens or 0, num_sequences=16, num_slots=36)
    assert plan_memory(config, model_file, smaller).fits
