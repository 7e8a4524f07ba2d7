"""A model on the GPU for timing: the engine's own path, without sequences, sampling or a store.

Owns loading, timing by the wall clock around a synchronised device, and the results' form.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.surroundings import surroundings
from daemon.checkpoint import PAGE_TOKENS
from daemon.config import kernel_cache_folder
from daemon.engine.backends.cuda_backend import CudaBackend
from daemon.engine.backends.cuda_memory import CudaLimits
from daemon.engine.batch import Batch, Span
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.kernels.kv_format import KvFormat
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device

RESULTS = Path(__file__).parent / "results"
MAX_SEQUENCES = 8


class GpuModel:
    """A model with states and pages for MAX_SEQUENCES sequences of `context` tokens."""

    def __init__(
        self, path: Path, context: int, max_rows: int, kv: str, pinned_bytes: int = 0
    ) -> None:
        began = time.perf_counter()
        file = open_gguf(path)
        self.shape = model_shape(file)
        self.device = Device.open()
        limits = CudaLimits(
            context_length=context,
            max_rows=max_rows,
            k_format=KvFormat[kv.upper()],
            v_format=KvFormat[kv.upper()],
            pinned_bytes=pinned_bytes,
        )
        compiler = Compiler(self.device.arch, kernel_cache_folder())
        self.backend = CudaBackend(self.device, compiler, limits, self.shape.rms_eps)
        self.model = load_model(file, self.backend)
        self.pages_each = -(-context // PAGE_TOKENS) + 1
        num_pages = self.pages_each * MAX_SEQUENCES
        self.backend.allocate(self.shape, MAX_SEQUENCES, num_pages)
        self.device.synchronize()
        self.load_s = time.perf_counter() - began
        for slot in range(MAX_SEQUENCES):
            self.backend.clear_slot(slot)
        self._rng = np.random.default_rng(0)

    def span(self, count: int, start: int, slot: int) -> Span:
        """`count` random tokens of sequence `slot` from position `start`."""
        tokens = self._rng.integers(0, self.shape.vocab_size, count).astype(np.int32)
        first = slot * self.pages_each
        pages = tuple(range(first, first + self.pages_each))
        return Span(tokens, start, slot, pages, samples=True)

    def prefill(self, count: int, start: int = 0) -> None:
        """Evaluate part of a prompt."""
        self.model.logits(Batch("prefill", (self.span(count, start, 0),)))

    def decode(self, num_sequences: int, position: int, first: int = 0) -> None:
        """One token of each sequence from the `first` on; what lies before `position` is whatever
        the pages hold."""
        slots = range(first, first + num_sequences)
        spans = tuple(self.span(1, position, slot) for slot in slots)
        self.model.logits(Batch("decode", spans))

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """Median time of `work`, after two rounds that compile and record."""
        times = []
        for _ in range(rounds + 2):
            self.device.synchronize()
            began = time.perf_counter()
            work()
            self.device.synchronize()
            times.append(time.perf_counter() - began)
        return median(times[2:])


def arguments(name: str) -> argparse.Namespace:
    """The flags that the scripts share, read."""
    return parser(name).parse_args()


def parser(name: str) -> argparse.ArgumentParser:
    """The flags that the scripts share."""
    flags = argparse.ArgumentParser(prog=name, description=f"Time {name} on the GPU.")
    flags.add_argument("model", type=Path, help="a GGUF file, such as make_model.py writes")
    flags.add_argument("--kv", default="q8_0", choices=("bf16", "q8_0", "fp8", "q4_0"))
    return flags


def write_results(name: str, model: GpuModel, path: Path, rows: list[dict[str, Any]]) -> None:
    """Keep rows with card, date, driver and commit; print where."""
    record = {
        "benchmark": name,
        **surroundings(),
        "model": path.name,
        "weights_bytes": path.stat().st_size,
        "load_s": round(model.load_s, 2),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}-{time.strftime('%Y%m%d')}-{path.stem}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {target}")
