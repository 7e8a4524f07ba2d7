"""Which backend computes, and what it is given: the CPU reference, or the GPU.

Owns the choice; part of assembly, so it may import any backend. The GPU's own modules are imported
only when it is chosen. A GPU that cannot be used is an error, never a silent turn to the CPU.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from daemon.config import EngineConfig, kernel_cache_folder
from daemon.engine.backends.backend import Backend
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.model.shape import ModelShape
from daemon.engine.weights.gguf import GGUFFile
from daemon.errors import ConfigError, NoDevice, OutOfDeviceMemory

NVIDIA_DRIVER = Path("/dev/nvidiactl")
CPU_PREFILL_TOKENS = 512
GPU_PREFILL_TOKENS = 2048
MAX_GPU_SEQUENCES = 16


def make_backend(config: EngineConfig, file: GGUFFile, shape: ModelShape, context: int) -> Backend:
    """The backend that the configuration asks for, without weights.

    Raises:
        NoDevice: the GPU is asked for, or present, and cannot be used.
        OutOfDeviceMemory: the weights cannot fit the CPU's memory as float32.
        ConfigError: settings that the device does not have.
    """
    if uses_gpu(config):
        return _cuda_backend(config, shape, context)
    if (config.key_format, config.value_format) != ("bf16", "bf16"):
        raise ConfigError("KV cache formats are the GPU's; the CPU reference keeps float32")
    _check_host_memory(file)
    return NumpyBackend(shape.rms_eps)


def uses_gpu(config: EngineConfig) -> bool:
    """Whether the GPU is chosen; "auto" takes it where an NVIDIA driver is loaded."""
    return config.device == "cuda" or (config.device == "auto" and NVIDIA_DRIVER.exists())


def prefill_tokens(config: EngineConfig) -> int:
    """Tokens of prompts in one step: short steps on the CPU, full ones on the GPU."""
    return GPU_PREFILL_TOKENS if uses_gpu(config) else CPU_PREFILL_TOKENS


def _cuda_backend(config: EngineConfig, shape: ModelShape, context: int) -> Backend:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise NoDevice(
            "the GPU needs the extra 'cuda': pip install 'qwend[cuda]', or pass --device cpu"
        )
    if config.parallel > MAX_GPU_SEQUENCES:
        raise ConfigError(f"--parallel {config.parallel}: the GPU takes {MAX_GPU_SEQUENCES}")
    from daemon.engine.backends.cuda_backend import CudaBackend
    from daemon.engine.backends.cuda_memory import CudaLimits
    from daemon.kernels.kv_format import KvFormat
    from daemon.kernels.runtime.compiler import Compiler
    from daemon.kernels.runtime.device import Device

    device = Device.open()
    limits = CudaLimits(
        max_rows=GPU_PREFILL_TOKENS,
        context_length=context,
        k_format=KvFormat[config.key_format.upper()],
        v_format=KvFormat[config.value_format.upper()],
    )
    return CudaBackend(device, Compiler(device.arch, kernel_cache_folder()), limits, shape.rms_eps)


def _check_host_memory(file: GGUFFile) -> None:
    needed = 4 * sum(tensor.num_elements for tensor in file.tensors.values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise OutOfDeviceMemory(
            f"{file.paths[0].name} takes {needed / 2**30:.1f} GiB as float32 on the CPU reference; "
            f"{free / 2**30:.1f} GiB are free"
        )
