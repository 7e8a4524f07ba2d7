"""Times the quantized linear layers of a 27B model: each product, and all of a token's in a row.

python -m benchmarks.quant_linear decode|prefill [results.json]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from daemon.kernels.quant_activations import CHUNKS, PANELS, ActivationKernels
from daemon.kernels.quant_gemm import GemmKernels
from daemon.kernels.quant_gemv import ADD, STORE, SWIGLU, GemvKernels, GemvShape, Plan
from daemon.kernels.quant_pack import FORMATS, PackedMatrix, Packer, RawMatrix
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.graph import Graph
from daemon.kernels.runtime.kernel import Module

WARM_UP_S = 0.25
"""An idle card takes that long to raise its clocks."""

READ = """
extern "C" __global__ void read(const uint4* data, long long n, int* total) {
    int sum = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
#pragma unroll 8
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const uint4 v = __ldcs(data + i);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 12345) *total = sum;
}
"""

HIDDEN, FFN, VOCAB = 5120, 17408, 248320
DELTA_NET = [("Q5_K", 10240), ("Q4_K", 6144), ("Q8_0", 48), ("Q8_0", 48)]
ATTENTION_Q4 = [("Q4_K", 12288), ("Q4_K", 1024), ("Q4_K", 1024)]
ATTENTION_Q6 = [("Q4_K", 12288), ("Q4_K", 1024), ("Q6_K", 1024)]


class Products:
    """The matrices of one layer kind, packed once and copied for each layer."""

    def __init__(self, shape: GemvShape | None = None) -> None:
        self.device = Device.open()
        self.compiler = Compiler(self.device.arch, None)
        self.packer = Packer(self.device, self.compiler)
        self.activations = ActivationKernels(self.device, self.compiler)
        self.gemv = GemvKernels(self.device, self.compiler, shape)
        self.gemm = GemmKernels(self.device, self.compiler)
        self.rng = np.random.default_rng(0)

    def raw(self, format: str, rows: int, columns: int) -> RawMatrix:
        row_bytes = columns // 256 * FORMATS[format].file_bytes
        few = self.rng.integers(0, 256, (min(rows, 512), row_bytes), np.uint8)
        data = np.tile(few, (-(-rows // len(few)), 1))[:rows]
        return RawMatrix(format, rows, columns, data.reshape(-1))

    def matrix(self, parts: list[tuple[str, int]], columns: int) -> PackedMatrix:
        return self.packer.pack([self.raw(f, rows, columns) for f, rows in parts])

    def copy(self, matrix: PackedMatrix) -> PackedMatrix:
        segments = []
        for segment in matrix.segments:
            tiles = self.device.allocate(segment.tiles.shape, np.uint8)
            self.device.copy(tiles, segment.tiles)
            segments.append(segment._replace(tiles=tiles))
        return matrix._replace(segments=tuple(segments))

    def median_ms(self, launches: Callable[[], None], repeats: int = 11) -> float:
        graph = Graph(self.device, launches)
        until = time.monotonic() + WARM_UP_S
        while time.monotonic() < until:
            graph.replay()
            self.device.synchronize()
        times = []
        for _ in range(repeats):
            start = self.device.record()
            graph.replay()
            times.append(self.device.elapsed_ms(start, self.device.record()))
        return statistics.median(times)

    def read_rate(self) -> float:
        """GB/s of a plain read of 2 GiB, 16 bytes a load: what weights can stream at."""
        data = self.device.allocate((2**31,), np.uint8)
        self.device.fill(data, 1)
        total = self.device.allocate((1,), np.int32)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "read.cu"
            source.write_text(READ)
            parameters = ("pointer", "int64", "pointer")
            cubin = self.compiler.cubin(source)
            cubin.code()  # before the file is gone
            kernel = Module(cubin).kernel("read", parameters)
        grid, block = (self.device.num_sms * 4, 1, 1), (512, 1, 1)
        arguments = (data, 2**31 // 16, total)
        stream = self.device.stream
        return 2**31 / self.median_ms(lambda: kernel.launch(stream, grid, block, *arguments)) / 1e6


def run_all(jobs: Sequence[Callable[[], None]]) -> None:
    """One launch after another."""
    for job in jobs:
        job()


Shapes = dict[str, tuple[PackedMatrix, int]]


def shapes_of(products: Products) -> Shapes:
    """Every product of the model once, with its epilogue."""
    gate, up = (products.raw("Q4_K", FFN, HIDDEN) for _ in range(2))
    return {
        "qkv|z|b|a": (products.matrix(DELTA_NET, HIDDEN), STORE),
        "ssm_out": (products.matrix([("Q4_K", HIDDEN)], 6144), ADD),
        "q|k|v": (products.matrix(ATTENTION_Q4, HIDDEN), STORE),
        "q|k|v Q6": (products.matrix(ATTENTION_Q6, HIDDEN), STORE),
        "gate|up": (products.packer.pack_paired(gate, up), SWIGLU),
        "down": (products.matrix([("Q4_K", HIDDEN)], FFN), ADD),
        "down Q6": (products.matrix([("Q6_K", HIDDEN)], FFN), ADD),
        "head": (products.matrix([("Q6_K", VOCAB)], HIDDEN), STORE),
    }


def prefill(products: Products) -> list[dict[str, object]]:
    """Each product at several prompt lengths; TFLOP/s of the product alone."""
    device, gemm = products.device, products.gemm
    results: list[dict[str, object]] = []
    shapes = shapes_of(products)
    del shapes["head"]
    x = device.to_device(products.rng.normal(size=(4096, FFN)).astype(np.float32))
    chunks = products.activations.operand(4096, FFN)
    products.activations.convert(x, chunks, CHUNKS)
    out = device.allocate((4096, 17408), np.float32)
    device.fill(out, 0)
    middle = products.activations.operand(4096, FFN)
    share = {"qkv|z|b|a": 48, "ssm_out": 64, "q|k|v": 8, "q|k|v Q6": 8, "gate|up": 64}
    share |= {"down": 32, "down Q6": 32}
    for tokens in (64, 256, 512, 1024, 2048, 4096):
        total = flops = 0.0
        for name, (matrix, epilogue) in shapes.items():
            plan = gemm.plan(matrix)
            target = middle if epilogue == SWIGLU else out

            job = partial(gemm.multiply, plan, chunks, tokens, target, epilogue)
            ms = products.median_ms(partial(run_all, [job] * 4), 5) / 4
            work = 2 * matrix.rows * matrix.columns * tokens
            total, flops = total + ms * share[name], flops + work * share[name]
            print(f"{name:10} n={tokens:4} {ms * 1e3:8.1f} us {work / ms / 1e9:6.0f} TFLOP/s")
            results.append({"product": name, "tokens": tokens, "us": ms * 1e3})
        print(
            f"all linear n={tokens:4} {total:8.2f} ms {flops / total / 1e9:6.0f} TFLOP/s"
            f" {tokens / total * 1e3:.0f} tok/s"
        )
        results.append({"product": "all", "tokens": tokens, "us": total * 1e3})
    return results


def decode(products: Products) -> list[dict[str, object]]:
    """Each product at 1, 8 and 16 rows, then all of a token's; GB/s of weights."""
    device, gemv = products.device, products.gemv
    shapes = shapes_of(products)
    x = device.to_device(products.rng.normal(size=(16, FFN)).astype(np.float32))
    panels = products.activations.operand(16, FFN)
    products.activations.convert(x, panels, PANELS)
    out = device.allocate((16, VOCAB), np.float32)
    device.fill(out, 0)
    middle = products.activations.operand(16, FFN)

    def run(plan: Plan, epilogue: int, tokens: int) -> None:
        target = middle if epilogue == SWIGLU else out
        gemv.multiply(plan, panels, tokens, target, epilogue)

    results: list[dict[str, object]] = []
    for name, (matrix, epilogue) in shapes.items():
        copies = max(2, -(-(400 * 2**20) // matrix.num_bytes))
        plans = [gemv.plan(products.copy(matrix)) for _ in range(copies)]
        for tokens in (1, 8, 16):
            rounds = max(1, 20 // copies)

            jobs = [partial(run, plan, epilogue, tokens) for plan in plans] * rounds
            ms = products.median_ms(partial(run_all, jobs)) / len(jobs)
            rate = matrix.num_bytes / ms / 1e6
            size = f"{matrix.num_bytes / 1e6:7.1f} MB"
            print(f"{name:10} m={tokens:2} {size} {ms * 1e3:7.1f} us {rate:6.0f} GB/s")
            results.append({"product": name, "tokens": tokens, "us": ms * 1e3, "gbps": rate})
    layers = copies_of_a_token(products, shapes)
    return results + whole_token(products, gemv, layers)


Layers = list[tuple[PackedMatrix, int]]


def copies_of_a_token(products: Products, shapes: Shapes) -> Layers:
    """Every matrix of a token with its epilogue, each in its own memory."""

    def layer(index: int) -> Layers:
        mixer = ["q|k|v Q6" if index % 8 == 3 else "q|k|v"] if index % 4 == 3 else ["qkv|z|b|a"]
        names = [*mixer, "ssm_out", "gate|up", "down Q6" if index % 2 else "down"]
        return [(products.copy(shapes[n][0]), shapes[n][1]) for n in names]

    return [*(product for index in range(64) for product in layer(index)), shapes["head"]]


def whole_token(products: Products, gemv: GemvKernels, layers: Layers) -> list[dict[str, object]]:
    """All products and norms of a token."""
    device = products.device
    x = device.to_device(products.rng.normal(size=(16, FFN)).astype(np.float32))
    panels, middle = (products.activations.operand(16, FFN) for _ in range(2))
    products.activations.convert(x, panels, PANELS)
    products.activations.convert(x, middle, PANELS)
    out = device.allocate((16, VOCAB), np.float32)
    device.fill(out, 0)
    norm = device.to_device(np.ones(HIDDEN, np.float32))
    plans = [(gemv.plan(matrix), epilogue) for matrix, epilogue in layers]
    num_bytes = sum(plan.matrix.num_bytes for plan, _ in plans)
    results: list[dict[str, object]] = []
    for tokens in (1, 8, 16):
        hidden = x.view((tokens, HIDDEN))
        jobs: list[Callable[[], None]] = []
        for number, (plan, epilogue) in enumerate(plans):
            if number % 2 == 0:
                convert = products.activations.convert
                jobs.append(partial(convert, hidden, panels, PANELS, norm))
            target = middle if epilogue == SWIGLU else out
            jobs.append(partial(gemv.multiply, plan, panels, tokens, target, epilogue))
        ms = products.median_ms(partial(run_all, jobs))
        rate = num_bytes / ms / 1e6
        print(f"all linear m={tokens:2} {num_bytes / 1e9:.2f} GB {ms:.3f} ms {rate:.0f} GB/s")
        results.append({"product": "all", "tokens": tokens, "us": ms * 1e3, "gbps": rate})
    return results


def main() -> None:
    products = Products()
    read = products.read_rate()
    print(f"{products.device.name}: read {read:.0f} GB/s")
    rows = {"decode": decode, "prefill": prefill}[sys.argv[1]](products)
    results = {"card": products.device.name, "read_gbps": read, "rows": rows}
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
