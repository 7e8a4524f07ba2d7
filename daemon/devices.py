"""Which backend computes, and what it is given: the CPU reference, or the GPU.

Owns the choice; part of assembly, so it may import any backend. The GPU's own modules are imported
only when it is chosen. A GPU that cannot be used is an error, never a silent turn to the CPU.
"""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.config import EngineConfig, kernel_cache_folder
from daemon.engine.backends.backend import Backend
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.memory.memory_plan import (
    CONTEXT_BYTES,
    MARGIN_BYTES,
    MemoryDemand,
    MemoryPlan,
    gibibytes,
)
from daemon.engine.model.shape import ModelShape
from daemon.engine.weights.gguf import GGUFFile
from daemon.errors import ConfigError, NoDevice, OutOfDeviceMemory

if TYPE_CHECKING:
    from daemon.engine.backends.cuda_memory import CudaLimits

logger = logging.getLogger(__name__)

NVIDIA_DRIVERS = (Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
"""What shows that a driver is there, on Linux and on Linux under Windows."""

CPU_PREFILL_TOKENS = 512
GPU_PREFILL_TOKENS = 2048
MAX_GPU_SEQUENCES = 16
MAX_MOVING_BYTES = 2 * 2**30
"""Of host memory to pin for snapshots on their way between device and store, beside those that stay
in memory; at most 1/16 of it all."""


def make_backend(
    config: EngineConfig,
    file: GGUFFile,
    shape: ModelShape,
    demand: MemoryDemand,
    checkpoint_bytes: int | None = None,
) -> Backend:
    """The backend that the configuration asks for, without weights; the GPU's memory is reserved.

    Args:
        checkpoint_bytes: of host memory in which checkpoints stay, to be pinned for the GPU; None:
            no checkpoints are kept.

    Raises:
        NoDevice: the GPU is asked for, or present, and cannot be used.
        OutOfDeviceMemory: model and context do not fit; says what would.
        ConfigError: settings that the device does not have.
    """
    if uses_gpu(config):
        return _cuda_backend(config, file, shape, demand, pinned_bytes(checkpoint_bytes))
    if (config.key_format, config.value_format) != ("bf16", "bf16"):
        raise ConfigError("KV cache formats are the GPU's; the CPU reference keeps float32")
    if config.gpu_memory_bytes is not None:
        raise ConfigError("--gpu-memory is the GPU's, and the CPU is to compute here")
    _check_host_memory(file)
    return NumpyBackend(shape.rms_eps)


def plan_memory(config: EngineConfig, file: GGUFFile, demand: MemoryDemand) -> MemoryPlan:
    """What the model would take on the GPU here, or where there is none, on a typical card.

    Raises:
        NoDevice: there is a GPU, but it cannot be used.
        TensorError, UnsupportedModel: the GPU cannot run the file.
    """
    _require_cuda(config)
    from daemon.engine.backends.cuda_plan import memory_needs
    from daemon.kernels.runtime.device import Device
    from daemon.kernels.runtime.paper_device import TYPICAL_CARD, card_of

    device = Device.open() if has_driver() else None
    card = TYPICAL_CARD if device is None else card_of(device)
    needs = memory_needs(file, card, _cuda_limits(config, demand), demand.num_slots)
    cap = config.gpu_memory_bytes
    budget = memory_budget(None if device is None else device.free_bytes(), cap)
    name = card.name if device or cap is None else f"a card of {gibibytes(cap)}"
    return MemoryPlan(card=name, demand=demand, needs=needs, budget_bytes=budget)


def memory_budget(free_bytes: int | None, cap_bytes: int | None) -> int | None:
    """What the regions may take of a card: the less of what is free and what is allowed.

    Args:
        free_bytes: after CUDA has taken its part; None without a card.
        cap_bytes: for everything, that part included.
    """
    limits = [] if free_bytes is None else [free_bytes]
    if cap_bytes is not None:
        limits.append(cap_bytes - CONTEXT_BYTES)
    return min(limits) - MARGIN_BYTES if limits else None


def pinned_bytes(checkpoint_bytes: int | None) -> int:
    """The most host memory to pin: what stays there, and what is on its way; at most half of it."""
    if checkpoint_bytes is None:
        return 0
    memory = _host_bytes("SC_PHYS_PAGES")
    return min(checkpoint_bytes + min(MAX_MOVING_BYTES, memory // 16), memory // 2)


def has_driver() -> bool:
    """Whether there is an NVIDIA driver, whatever may be wrong with it."""
    return any(path.exists() for path in NVIDIA_DRIVERS)


def uses_gpu(config: EngineConfig) -> bool:
    """Whether the GPU is chosen; "auto" takes it where an NVIDIA driver is loaded."""
    return config.device == "cuda" or (config.device == "auto" and has_driver())


def prefill_tokens(config: EngineConfig) -> int:
    """Tokens of prompts in one step: short steps on the CPU, full ones on the GPU."""
    return GPU_PREFILL_TOKENS if uses_gpu(config) else CPU_PREFILL_TOKENS


def _cuda_backend(
    config: EngineConfig,
    file: GGUFFile,
    shape: ModelShape,
    demand: MemoryDemand,
    pinned_bytes: int,
) -> Backend:
    _require_cuda(config)
    from daemon.engine.backends.cuda_backend import CudaBackend
    from daemon.engine.backends.cuda_plan import memory_needs
    from daemon.kernels.runtime.compiler import Compiler
    from daemon.kernels.runtime.device import Device
    from daemon.kernels.runtime.paper_device import card_of

    device = Device.open()
    limits = _cuda_limits(config, demand, pinned_bytes)
    compiler = Compiler(device.arch, kernel_cache_folder())
    plan = MemoryPlan(
        card=device.name,
        demand=demand,
        needs=memory_needs(file, card_of(device), limits, demand.num_slots, compiler),
        budget_bytes=memory_budget(device.free_bytes(), config.gpu_memory_bytes),
    )
    plan.check()
    logger.info("%s", plan.summary)
    return CudaBackend(device, compiler, limits, shape.rms_eps, plan)


def _require_cuda(config: EngineConfig) -> None:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise NoDevice(
            "the GPU needs the extra 'cuda': pip install 'qwend[cuda]', or pass --device cpu"
        )
    if config.parallel > MAX_GPU_SEQUENCES:
        raise ConfigError(f"--parallel {config.parallel}: the GPU takes {MAX_GPU_SEQUENCES}")


def _cuda_limits(config: EngineConfig, demand: MemoryDemand, pinned_bytes: int = 0) -> "CudaLimits":
    from daemon.engine.backends.cuda_memory import CudaLimits
    from daemon.kernels.kv_format import KvFormat

    return CudaLimits(
        max_rows=GPU_PREFILL_TOKENS,
        max_sequences=demand.num_sequences,
        context_length=demand.context_length,
        k_format=KvFormat[config.key_format.upper()],
        v_format=KvFormat[config.value_format.upper()],
        pinned_bytes=pinned_bytes,
    )


def _check_host_memory(file: GGUFFile) -> None:
    needed = 4 * sum(tensor.num_elements for tensor in file.tensors.values())
    free = _host_bytes("SC_AVPHYS_PAGES")
    if needed > free:
        raise OutOfDeviceMemory(
            f"{file.paths[0].name} takes {needed / 2**30:.1f} GiB as float32 on the CPU reference; "
            f"{free / 2**30:.1f} GiB are free"
        )


def _host_bytes(pages: str) -> int:
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
