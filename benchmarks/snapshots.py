"""Times snapshots on the GPU: saves beside the engine, and restores from memory and from disk.

python -m benchmarks.snapshots MODEL.gguf [--folder FOLDER]

Everything but the sequence's evaluation is the daemon's own: a prompt of 100K tokens is saved piece
by piece through the real store, then restored from pinned host memory and, after the store has been
opened anew, from its file in the page cache, with 512 tokens of prompt to evaluate behind it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu_model import GpuModel, parser, write_results
from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.checkpoint import PAGE_TOKENS, HostBytes, Snapshot
from daemon.commands.serve import SWITCH_INTERVAL_S
from daemon.engine.backends.backend import Contents
from daemon.engine.batch import Batch
from daemon.engine.checkpointing import NoTimeline
from daemon.engine.requests import GenerationRequest
from daemon.engine.saving import Saving
from daemon.engine.sequence import Sequence
from daemon.kernels.runtime.pinned_pool import SLAB_BYTES

SIZES = (32_768, 100_032)
NEW_TOKENS = 512
SAVE_EVERY = 8_192
"""Tokens: the largest distance between checkpoints of a long prompt."""

SAVE_PAUSE_S = 0.7
"""What 8,192 tokens take to be evaluated; meanwhile the disk writes, and the pool pins buffers."""

ROUNDS, DISK_ROUNDS = 7, 3
PINNING_S = 4.0
"""Long enough for the pool's buffers to be pinned, as they are in a daemon that has started."""

PINNED_BYTES, MEMORY_BYTES, DISK_BYTES = 12 << 30, 7 << 30, 8 << 30
STEPS, WARM_STEPS = 80, 5
PINNED_BESIDE = 16
"""Slabs: 1 GiB."""

FINGERPRINT = b"made-up numbers "

Row = dict[str, Any]


class AllMissing(NoTimeline):
    """Wants every page, and drops it."""

    def missing_pages(self, position: int, num_grid_pages: int) -> range:
        """All of them."""
        return range(position // PAGE_TOKENS)


def main() -> None:
    """Print one table, write the results."""
    given = _arguments()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    model = GpuModel(given.model, SIZES[-1] + 2048, 2048, given.kv, PINNED_BYTES)
    time.sleep(PINNING_S)
    load = model.load_s, given.model.stat().st_size / model.load_s / 1e9
    rows: list[Row] = [{"what": "load", "s": load[0], "gb_per_s": load[1]}]
    rows += _copies(model)
    rows += _steps_beside(model)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows += _stored(model, Path(folder))
    rows.append({"what": "buffers not pinned", "count": model.backend.host_buffers.num_unpinned})
    for row in rows:
        figures = (f"{name} {_figure(value)}" for name, value in row.items() if name != "what")
        print(f"{row['what']:<34}", *figures, sep="  ")
    write_results("snapshots", model, given.model, rows)


def _arguments() -> argparse.Namespace:
    flags = parser("snapshots")
    flags.add_argument("--folder", type=Path, help="for the store, 4 GB; the system's by default")
    return flags.parse_args()


def _copies(model: GpuModel) -> list[Row]:
    """The copies alone, of the state and of states with pages: out, and in."""
    rows, backend = [], model.backend
    for num_tokens in (0, *SIZES):
        pages = range(num_tokens // PAGE_TOKENS)

        def read(pages: range = pages) -> Contents:
            return backend.begin_read(0, pages).result()

        read_ms = model.seconds(read, ROUNDS) * 1e3
        state, contents = read()
        pinned: dict[int, HostBytes] = dict(zip(pages, contents, strict=True))

        def write(state: HostBytes = state, pages: dict[int, HostBytes] = pinned) -> None:
            backend.begin_write(1, state, pages).arrived.result()

        write_ms = model.seconds(write, ROUNDS) * 1e3
        num_bytes = len(state) + sum(map(len, contents))
        for what, ms in (("copied to the host", read_ms), ("copied to the device", write_ms)):
            speed = num_bytes / ms / 1e6
            rows.append({"what": what, "tokens": num_tokens, "ms": ms, "gb_per_s": speed})
    return rows


def _steps_beside(model: GpuModel) -> list[Row]:
    """One sequence decodes while others' snapshots move: nobody's tokens may wait for them."""
    backend, pages = model.backend, range(SIZES[-1] // PAGE_TOKENS)
    state, contents = backend.begin_read(0, pages).result()
    pinned: dict[int, HostBytes] = dict(zip(pages, contents, strict=True))
    # As many buffers again, for the saves.
    time.sleep(PINNING_S)

    slabs: list[Any] = []

    def pin() -> None:
        model.device.use_here()
        slabs.extend(model.device.allocate_pinned(SLAB_BYTES) for _ in range(PINNED_BESIDE))

    thread = ThreadPoolExecutor(1)
    beside: dict[str, Callable[[], Future[Any]] | None] = {
        "nothing": None,
        "saving": lambda: backend.begin_read(0, pages),
        "restoring": lambda: backend.begin_write(1, state, pinned).arrived,
        "pinning": lambda: thread.submit(pin),
    }
    return [{"what": f"a step beside {what}", **_step_ms(model, b)} for what, b in beside.items()]


def _step_ms(model: GpuModel, beside: Callable[[], Future[Any]] | None) -> Row:
    taken = []
    going: Future[Any] | None = None
    for number in range(STEPS):
        if beside is not None and (going is None or going.done()):
            going = beside()
        began = time.perf_counter()
        model.decode(1, 1024 + number, first=2)
        model.device.synchronize()
        taken.append((time.perf_counter() - began) * 1e3)
    if going is not None:
        going.result()
    return {"ms": median(taken[WARM_STEPS:]), "at_most_ms": max(taken[WARM_STEPS:])}


def _stored(model: GpuModel, folder: Path) -> list[Row]:
    """Through the store: what the engine's thread spends on saves, and restores from both tiers."""
    tokens = np.random.default_rng(1).integers(0, model.shape.vocab_size, SIZES[-1] + 1).tolist()
    cache = _open(model, folder)
    rows = _save(model, cache, tokens)
    for num_tokens in SIZES:
        rows.append(_restored(model, lambda: cache, tokens[: num_tokens + 1], ROUNDS))

    def reopened() -> CheckpointCache:
        nonlocal cache
        cache.close()
        cache = _open(model, folder)
        return cache

    for num_tokens in SIZES:
        rows.append(_restored(model, reopened, tokens[: num_tokens + 1], DISK_ROUNDS))
    cache.close()
    return rows


def _open(model: GpuModel, folder: Path) -> CheckpointCache:
    limits = CacheLimits(budget_bytes=DISK_BYTES, memory_bytes=MEMORY_BYTES)
    cache = CheckpointCache.open(folder, limits, fingerprint=FINGERPRINT, model_name="random")
    cache.expect(*model.backend.snapshot_sizes, model.backend.host_buffer)
    return cache


def _save(model: GpuModel, cache: CheckpointCache, tokens: list[int]) -> list[Row]:
    """As the engine saves a long prompt: what its thread spends, and when it is in the store."""
    request = GenerationRequest(id="r", tokens=tuple(tokens), max_tokens=1)
    sequence = Sequence(request, lambda event: None, cache.timeline(tokens, "benchmark"))
    sequence.pages = tuple(range(SIZES[-1] // PAGE_TOKENS))
    sequence.num_grid_pages = len(sequence.pages)
    saving = Saving(model.backend, lambda: None)
    engine_ms, total_ms = [], []
    for position in sorted({*range(SAVE_EVERY, SIZES[-1], SAVE_EVERY), *SIZES}):
        began = time.perf_counter()
        saving.begin(sequence, position, 0, "prompt", "user")
        engine_ms.append((time.perf_counter() - began) * 1e3)
        saving.finish()
        total_ms.append((time.perf_counter() - began) * 1e3)
        if position in SIZES:
            # What waits for a slow disk may be given up; these are to be restored.
            cache.flush()
        time.sleep(SAVE_PAUSE_S)
    cache.flush()
    sequence.timeline = AllMissing()
    began = time.perf_counter()
    saving.begin(sequence, SIZES[-1], 0, "prompt", "user")
    at_once_ms = (time.perf_counter() - began) * 1e3
    saving.finish()
    row = {"engine_ms": median(engine_ms), "at_most_ms": max(engine_ms)}
    row["in_store_ms"] = median(total_ms)
    return [
        {"what": "saved every 8,192 tokens", "tokens": SIZES[-1], **row},
        {"what": "saved all at once", "tokens": SIZES[-1], "engine_ms": at_once_ms},
    ]


def _restored(
    model: GpuModel, cache: Callable[[], CheckpointCache], tokens: list[int], rounds: int
) -> Row:
    """Medians, all from the moment when the checkpoint is asked for."""
    taken: list[Row] = []
    for number in range(rounds + 1):
        timeline = cache().timeline(tokens, "benchmark")
        found = timeline.find(len(tokens) - 1, strict=True)
        assert found is not None
        assert found.position == len(tokens) - 1
        model.device.synchronize()
        began = time.perf_counter()
        snapshot = timeline.load(found).result()
        assert snapshot is not None
        row = {"read_ms": (time.perf_counter() - began) * 1e3}
        row |= _to_the_device(model, snapshot, began, is_streamed=number % 2 == 0)
        taken.append(row)
    names = dict.fromkeys(name for row in taken[1:] for name in row)
    medians = {name: median(row[name] for row in taken[1:] if name in row) for name in names}
    return {"what": f"restored, {found.tier}", "tokens": found.position, **medians}


def _to_the_device(model: GpuModel, snapshot: Snapshot, began: float, is_streamed: bool) -> Row:
    """Let the first layers pass, then all; and the prompt that follows, behind or meanwhile."""

    def since_ms() -> float:
        return (time.perf_counter() - began) * 1e3

    writing = model.backend.begin_write(0, snapshot.state, snapshot.pages)
    writing.given.result()
    row = {"given_ms": since_ms()}
    if not is_streamed:
        transfers, batch = model.backend._memory.transfers, _behind(model, snapshot.position)
        transfers.before_step(batch)
        transfers.before_layer("delta_net", 0)
        model.device.synchronize()
        row["first_layers_ms"] = since_ms()
        transfers.after_step()
        model.device.synchronize()
        row["all_ms"] = since_ms()
    model.model.logits(_behind(model, snapshot.position))
    model.device.synchronize()
    row["streamed_and_512_ms" if is_streamed else "whole_and_512_ms"] = since_ms()
    return row


def _behind(model: GpuModel, position: int) -> Batch:
    return Batch("prefill", (model.span(NEW_TOKENS, position, 0),))


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


if __name__ == "__main__":
    main()
