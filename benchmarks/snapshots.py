"""Times snapshots on the GPU: states and pages to pinned host memory, and back from there or not.

python -m benchmarks.snapshots MODEL.gguf
"""

import time
from typing import Any

from benchmarks.gpu_model import GpuModel, arguments, write_results
from daemon.checkpoint import HostBytes

CONTEXT = 32_768 + 64
PAGES = (0, 192, 512)
"""Of a snapshot: the state alone, 12,288 tokens, 32,768 tokens."""

ROUNDS = 7
PINNING_S = 3.0
"""Long enough for the pool's buffers to be pinned, as they are in a daemon that has started."""


def main() -> None:
    """Print a line a direction, write the results."""
    given = arguments("snapshots")
    model = GpuModel(given.model, CONTEXT, 2048, given.kv)
    time.sleep(PINNING_S)
    rows: list[dict[str, Any]] = [{"what": "load", "gb_per_s": _load_speed(model, given.model)}]
    for num_pages in PAGES:
        rows += _round_trip(model, range(num_pages))
    for row in rows:
        print(*row.values(), sep="\t")
    write_results("snapshots", model, given.model, rows)


def _round_trip(model: GpuModel, pages: range) -> list[dict[str, Any]]:
    backend = model.backend
    state, contents = backend.begin_read(0, pages).result()
    pinned = dict(zip(pages, contents, strict=True))
    copied: dict[int, HostBytes] = {page: bytes(content) for page, content in pinned.items()}
    state_copy = bytes(state)
    num_bytes = len(state_copy) + sum(map(len, copied.values()))

    def save() -> None:
        backend.begin_read(0, pages).result()

    def restore() -> None:
        backend.write_snapshot(1, state, pinned)

    def restore_unpinned() -> None:
        backend.write_snapshot(1, state_copy, copied)

    works = {"save": save, "restore": restore, "restore from ordinary memory": restore_unpinned}
    rows = []
    for what, work in works.items():
        seconds = model.seconds(work, ROUNDS)
        speed = round(num_bytes / seconds / 1e9, 1)
        rows.append({"what": what, "pages": len(pages), "ms": seconds * 1e3, "gb_per_s": speed})
    return rows


def _load_speed(model: GpuModel, path: Any) -> float:
    return round(path.stat().st_size / model.load_s / 1e9, 2)


if __name__ == "__main__":
    main()
