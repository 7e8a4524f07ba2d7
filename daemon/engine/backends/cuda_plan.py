"""What a model would take on a GPU, found by loading it onto a card that exists on paper.

The code that takes memory is the code that is asked, so what is planned and what is taken are one
computation. Reads no tensor data. Any thread.
"""

from collections import defaultdict

from daemon.engine.backends.cuda_backend import CudaBackend
from daemon.engine.backends.cuda_memory import CudaLimits, kv_layout
from daemon.engine.memory.memory_plan import (
    STATES,
    WEIGHTS,
    WORKSPACE,
    MemoryNeeds,
    WeightsOfFormat,
)
from daemon.engine.weights.gguf import GGUFFile, Tensor
from daemon.engine.weights.loader import load_model, model_shape
from daemon.kernels.runtime.paper_device import Card, PaperCompiler, PaperDevice


def memory_needs(file: GGUFFile, card: Card, limits: CudaLimits, num_slots: int) -> MemoryNeeds:
    """Bytes of weights, states and workspace on such a card, and of one page.

    Raises:
        TensorError, UnsupportedModel: the file cannot be loaded.
    """
    shape = model_shape(file)
    device = PaperDevice(card)
    backend = CudaBackend(device, PaperCompiler(card.arch), limits, shape.rms_eps)
    loaded: list[Tensor] = []
    load_model(file, backend, loaded.append)
    backend.allocate(shape, num_slots, num_pages=1)
    return MemoryNeeds(
        formats=_by_format(loaded),
        weights_bytes=device.peak_bytes[WEIGHTS],
        states_bytes=device.peak_bytes[STATES],
        workspace_bytes=device.peak_bytes[WORKSPACE],
        page_bytes=kv_layout(shape, limits).page_bytes,
        num_slots=num_slots,
    )


def _by_format(tensors: list[Tensor]) -> tuple[WeightsOfFormat, ...]:
    """Largest first."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for tensor in tensors:
        sizes[tensor.format.name].append(tensor.num_bytes)
    rows = [WeightsOfFormat(name, len(each), sum(each)) for name, each in sizes.items()]
    return tuple(sorted(rows, key=lambda row: -row.num_bytes))
