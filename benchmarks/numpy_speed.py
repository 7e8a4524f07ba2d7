"""Times the NumPy reference backend on the embedded model, beside the machine's own limits.

    python -m benchmarks.numpy_speed [--rounds 8] [--model FILE.gguf] [--no-save]

Decoding cannot be faster than reading every weight once a token; evaluating a prompt cannot be
faster than the multiplications it needs. Both limits are measured in the same run: a machine that
is shared gives other figures every minute, so the best round counts, and the median tells how
noisy it was.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from benchmarks.surroundings import surroundings
from daemon.assemble import embedded_model
from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.batch import Batch, Span
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 1000
SHORT_PROMPT_TOKENS = 16
DECODED_TOKENS = 48
PREFILL_TOKENS = 512
SLOT, KEPT_SLOT = 0, 1
PAGES = tuple(range(-(-(PROMPT_TOKENS + DECODED_TOKENS) // PAGE_TOKENS)))


class Rates(msgspec.Struct, frozen=True):
    """Tokens a second over the rounds, and what the machine's limit would give."""

    best: float
    median: float
    limit: float

    @classmethod
    def of(cls, num_tokens: int, seconds: Sequence[float], limit: float) -> "Rates":
        """From the times of all rounds."""
        best, usual = num_tokens / min(seconds), num_tokens / median(seconds)
        return cls(round(best, 1), round(usual, 1), round(limit, 1))


def load(path: Path) -> Model:
    """The model on the reference backend, with room for one text."""
    file = open_gguf(path)
    backend = NumpyBackend(model_shape(file).rms_eps)
    backend.attach()
    model = load_model(file, backend)
    backend.allocate(model.shape, num_slots=2, num_pages=len(PAGES))
    return model


# ── what is timed ─────────────────────────────────────────────────────────────────────────────


def prefill(model: Model, tokens: np.ndarray) -> None:
    """A prompt from its first token, in steps as the engine takes them."""
    model.backend.clear_slot(SLOT)
    for start in range(0, len(tokens), PREFILL_TOKENS):
        part = tokens[start : start + PREFILL_TOKENS]
        is_last = start + len(part) == len(tokens)
        model.logits(Batch("prefill", (Span(part, start, SLOT, PAGES, samples=is_last),)))


def decode(model: Model, tokens: np.ndarray, start: int) -> None:
    """Tokens one by one, from the state that lies in the slot."""
    for position, token in enumerate(np.split(tokens, len(tokens)), start):
        model.logits(Batch("decode", (Span(token, position, SLOT, PAGES, samples=True),)))


def time_decode(model: Model, tokens: np.ndarray, start: int, rounds: int) -> list[float]:
    """Seconds of each round of DECODED_TOKENS after `start` tokens of prompt."""
    prefill(model, tokens[:start])
    model.backend.copy_slot(SLOT, KEPT_SLOT)
    later = tokens[:DECODED_TOKENS]

    def one_round() -> None:
        decode(model, later, start)

    def rewind() -> None:
        model.backend.copy_slot(KEPT_SLOT, SLOT)

    return seconds_of(one_round, rounds, before=rewind)


def seconds_of(
    work: Callable[[], Any], rounds: int, before: Callable[[], None] = lambda: None
) -> list[float]:
    """Times of `rounds` runs, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times[1:]


# ── the limits ────────────────────────────────────────────────────────────────────────────────


def arrays_of(weights: Any) -> Iterator[np.ndarray]:
    """All arrays of the model's weights, wherever they are."""
    if isinstance(weights, np.ndarray):
        yield weights
    elif isinstance(weights, tuple):
        for item in weights:
            yield from arrays_of(item)
    elif isinstance(weights, msgspec.Struct):
        for name in weights.__struct_fields__:
            yield from arrays_of(getattr(weights, name))


def read_bandwidth(num_bytes: int, rounds: int) -> float:
    """Bytes a second of matrix-vector products over as many bytes as the weights have."""
    columns = 1024
    matrices = [
        np.ones((columns, columns), np.float32) for _ in range(num_bytes // (4 * columns**2))
    ]
    vector, out = np.ones(columns, np.float32), np.empty(columns, np.float32)

    def read_all() -> None:
        for matrix in matrices:
            np.matmul(vector, matrix, out=out)

    return sum(matrix.nbytes for matrix in matrices) / min(seconds_of(read_all, rounds))


def multiply_rate(rounds: int) -> float:
    """Floating-point operations a second of a large float32 matrix product."""
    size = 1024
    left, right = (np.ones((size, size), np.float32) for _ in range(2))
    out = np.empty((size, size), np.float32)
    seconds = min(seconds_of(lambda: np.matmul(left, right, out=out), rounds))
    return 2 * size**3 / seconds


# ── one run ───────────────────────────────────────────────────────────────────────────────────


def measure(model: Model, rounds: int) -> dict[str, Any]:
    """All rates and the limits they are measured against."""
    tokens = np.random.default_rng(0).integers(0, model.shape.vocab_size, PROMPT_TOKENS)
    tokens = tokens.astype(np.int32)
    layers = sum(array.size for array in arrays_of(model.weights.layers))
    weights = layers + model.weights.head.size
    bandwidth, multiplies = read_bandwidth(4 * weights, rounds), multiply_rate(rounds)
    decode_limit, prefill_limit = bandwidth / (4 * weights), multiplies / (2 * layers)
    short = time_decode(model, tokens, SHORT_PROMPT_TOKENS, rounds)
    long = time_decode(model, tokens, PROMPT_TOKENS, rounds)
    prompt = seconds_of(lambda: prefill(model, tokens), rounds)
    rates = {
        "decode": Rates.of(DECODED_TOKENS, short, decode_limit),
        f"decode after {PROMPT_TOKENS}": Rates.of(DECODED_TOKENS, long, decode_limit),
        f"prefill of {PROMPT_TOKENS}": Rates.of(PROMPT_TOKENS, prompt, prefill_limit),
    }
    return {
        "rounds": rounds,
        "weight_bytes": 4 * weights,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "multiply_gflop_per_s": round(multiplies / 1e9, 1),
        "tokens_per_s": msgspec.to_builtins(rates),
    }


def conditions(path: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        **surroundings(),
        "model": path.name,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """As Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(figures: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{figures['cpu']}, {figures['cores']} cores, load {figures['load']}, "
        f"NumPy {figures['numpy']}",
        f"reads {figures['read_gb_per_s']} GB/s, multiplies {figures['multiply_gflop_per_s']} "
        f"GFLOP/s; weights {figures['weight_bytes'] / 1e6:.1f} MB",
        f"{'tokens/s':>20} {'best':>8} {'median':>8} {'limit':>8}",
    ]
    for name, rates in figures["tokens_per_s"].items():
        lines.append(
            f"{name:>20} {rates['best']:8.0f} {rates['median']:8.0f} {rates['limit']:8.0f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="numpy_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", type=Path, help="GGUF file (default: the embedded model)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    path = arguments.model or embedded_model()
    figures = conditions(path) | measure(load(path), arguments.rounds)
    print(table(figures))
    if not arguments.no_save:
        target = RESULTS / f"numpy_speed-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        target.write_text(json.dumps(figures, indent=2) + "\n")
        print(target)


if __name__ == "__main__":
    main()
