"""Model files without data: metadata and the table of tensors, of any size of the family."""

import numpy as np

from benchmarks.make_model import architecture_metadata, plan_tensors
from benchmarks.model_sizes import SIZES, ModelSizes
from daemon.engine.weights.gguf import GGUFFile, Tensor
from daemon.engine.weights.quant_formats import QUANT_FORMATS


def tensor_table(size: str | ModelSizes, mix: str = "q4_k_m") -> GGUFFile:
    sizes = SIZES[size] if isinstance(size, str) else size
    nothing = np.empty(0, np.uint8)
    tensors = {
        planned.name: Tensor(
            planned.name, planned.shape, QUANT_FORMATS[int(planned.format)], nothing
        )
        for planned in plan_tensors(sizes, mix)
    }
    return GGUFFile((), architecture_metadata(sizes, "planned"), tensors)
