"""What a model would take on a GPU, found by loading and running it on a card that exists on paper.

The code that takes memory and asks for kernels is the code that is watched, so what is planned and
what comes are one computation. Reads no tensor data. Any thread.
"""

from collections import defaultdict

import numpy as np

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.cuda_backend import CudaBackend
from daemon.engine.backends.cuda_memory import CudaLimits, kv_layout
from daemon.engine.batch import Batch, Span
from daemon.engine.memory.memory_plan import (
    STATES,
    WEIGHTS,
    WORKSPACE,
    MemoryNeeds,
    WeightsOfFormat,
)
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import GGUFFile, Tensor
from daemon.engine.weights.loader import load_model, model_shape
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.paper_device import Card, PaperCompiler, PaperDevice


def memory_needs(
    file: GGUFFile,
    card: Card,
    limits: CudaLimits,
    num_slots: int,
    compiler: Compiler | None = None,
) -> MemoryNeeds:
    """Bytes of weights, states and workspace on such a card, and of one page.

    Args:
        compiler: begins to compile every kernel that the model's steps launch, if it is given.

    Raises:
        TensorError, UnsupportedModel: the file cannot be loaded.
    """
    shape = model_shape(file)
    device = PaperDevice(card)
    backend = CudaBackend(device, compiler or PaperCompiler(card.arch), limits, shape.rms_eps)
    loaded: list[Tensor] = []
    model = load_model(file, backend, loaded.append)
    backend.allocate(shape, num_slots, num_pages=1)
    needs = MemoryNeeds(
        formats=_by_format(loaded),
        weights_bytes=device.peak_bytes[WEIGHTS],
        states_bytes=device.peak_bytes[STATES],
        workspace_bytes=device.peak_bytes[WORKSPACE],
        page_bytes=kv_layout(shape, limits).page_bytes,
        num_slots=num_slots,
    )
    if compiler is not None:
        _run_steps(model, limits)
    return needs


def _run_steps(model: Model, limits: CudaLimits) -> None:
    """A step of every kind that has kernels of its own."""
    for num_rows in {1, limits.decode_rows}:
        model.logits(Batch("decode", tuple(_span(1, slot) for slot in range(num_rows))))
    # Tiles change their width with every 64 tokens: none may be compiled while somebody waits.
    for num_tokens in range(PAGE_TOKENS, limits.max_rows + 1, PAGE_TOKENS):
        model.logits(Batch("prefill", (_span(num_tokens, 0),)))


def _span(num_tokens: int, slot: int) -> Span:
    return Span(np.zeros(num_tokens, np.int32), 0, slot, pages=(0,), samples=True)


def _by_format(tensors: list[Tensor]) -> tuple[WeightsOfFormat, ...]:
    """Largest first."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for tensor in tensors:
        sizes[tensor.format.name].append(tensor.num_bytes)
    rows = [WeightsOfFormat(name, len(each), sum(each)) for name, each in sizes.items()]
    return tuple(sorted(rows, key=lambda row: -row.num_bytes))
