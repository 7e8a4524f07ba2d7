"""Times a layer of experts on the GPU, kernel by kernel: 35B-A3B shapes, decode and prefill.

Decode is timed as a graph of many layers, each with its own weights, so that none is left in
cache. Limits: bytes of the chosen experts over the rate of a plain read; operations over the
tensor cores' rate.

    python -m benchmarks.moe [--size 35b-a3b] [--formats q4_k q4_k q6_k] [results.json]
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.model_sizes import SIZES, ModelSizes
from benchmarks.quant_linear import Products, run_all
from daemon.kernels.moe_decode import MoeDecode
from daemon.kernels.moe_pack import (
    ExpertMatrix,
    GatedExperts,
    RawExperts,
    pack_experts,
    pack_gated,
)
from daemon.kernels.moe_prefill import MoePrefill
from daemon.kernels.moe_route import MoeRoute, MoeSizes, RouteLists, RowLines
from daemon.kernels.quant_pack import FORMATS
from daemon.kernels.runtime.device_array import DeviceArray

EPS = 1e-6
MAX_ROWS = 4096
LAYERS = 8
"""With weights of their own: together far more than fits a cache."""

FEW_ROWS = (1, 2, 4, 8, 16)
MANY_ROWS = (64, 512, 2048, 4096)
TFLOPS = 700.0
"""What cuBLAS reaches in fp16 on an H100."""

Row = dict[str, object]


class Layer:
    """Weights of one layer; the tensors' values are random bits."""

    def __init__(self, products: Products, sizes: ModelSizes, formats: list[str]) -> None:
        hidden, count, width = sizes.hidden, sizes.experts, sizes.expert_dim
        gate, up, down = formats
        packer, device, rng = products.packer, products.device, products.rng

        def raw(format: str, experts: int, rows: int, columns: int) -> RawExperts:
            return RawExperts(experts, products.raw(format, experts * rows, columns))

        gates = raw(gate, count, width, hidden), raw(up, count, width, hidden)
        self.gate_up: GatedExperts = pack_gated(packer, *gates)
        self.down: ExpertMatrix = pack_experts(packer, raw(down, count, hidden, width))
        shared = raw(gate, 1, sizes.shared_dim, hidden), raw(gate, 1, sizes.shared_dim, hidden)
        self.shared_gate_up: GatedExperts = pack_gated(packer, *shared)
        self.shared_down = pack_experts(packer, raw(down, 1, hidden, sizes.shared_dim))
        router = rng.normal(0, hidden**-0.5, (count + 1, hidden)).astype(np.float32)
        self.norm = device.to_device(np.ones(hidden, np.float32))
        self.router = device.to_device(router)

    def expert_bytes(self) -> tuple[int, int]:
        """Of one routed expert's gate and up, and of its down."""
        gate_up = sum(part.tiles.num_bytes for part in self.gate_up.parts)
        return gate_up // self.down.num_experts, self.down.tiles.num_bytes // self.down.num_experts


class Mixer:
    """The kernels, and a residual to work on."""

    def __init__(self, products: Products, sizes: ModelSizes) -> None:
        common = (products.device, products.compiler)
        self.sizes = MoeSizes(sizes.experts, sizes.experts_used, sizes.hidden, True)
        width = max(sizes.expert_dim, sizes.shared_dim)
        self.route = MoeRoute(*common, self.sizes, MAX_ROWS)
        self.decode = MoeDecode(*common, self.sizes, width)
        self.prefill = MoePrefill(*common, self.sizes, width, MAX_ROWS)
        self.lists = RouteLists.allocate(products.device, self.sizes)
        self.lines = RowLines.allocate(products.device, self.sizes, MAX_ROWS)
        x = products.rng.normal(size=(MAX_ROWS, sizes.hidden)).astype(np.float32)
        self.x = products.device.to_device(x)
        self.residual = products.device.to_device(x)
        self.panels = products.activations.operand(16, sizes.hidden)

    def route_few(self, layer: Layer, rows: int) -> None:
        x = self.x.rows(0, rows)
        self.route.few(x, layer.norm, layer.router, self.panels, self.lists, EPS)

    def gate_up(self, layer: Layer, rows: int) -> None:
        self.decode.gate_up(layer.gate_up, layer.shared_gate_up, self.panels, self.lists, rows)

    def down(self, layer: Layer, rows: int) -> None:
        residual = self.residual.rows(0, rows)
        self.decode.down(layer.down, layer.shared_down, self.lists, residual)

    def decode_layer(self, layer: Layer, rows: int) -> None:
        self.route_few(layer, rows)
        self.gate_up(layer, rows)
        self.down(layer, rows)

    def route_many(self, layer: Layer, rows: int) -> None:
        x = self.x.rows(0, rows)
        self.route.many(x, layer.norm, layer.router, self.lines.of(rows), EPS)

    def prefill_layer(self, layer: Layer, rows: int) -> None:
        self.route_many(layer, rows)
        experts = self.sizes.num_experts
        gate: DeviceArray = layer.router.rows(experts, experts + 1)
        self.prefill.mix(
            (layer.gate_up, layer.shared_gate_up), (layer.down, layer.shared_down),
            layer.norm, gate, self.lines.of(rows), self.residual.rows(0, rows), EPS,
        )  # fmt: skip


def decode(products: Products, mixer: Mixer, layers: list[Layer], gbps: float) -> list[Row]:
    """Each kernel alone and the three in a row, for one layer."""
    gate_up_bytes, down_bytes = layers[0].expert_bytes()
    results: list[Row] = []
    for rows in FEW_ROWS:
        # Lists for these rows, which the kernels that are timed alone work from.
        mixer.route_few(layers[0], rows)
        num_experts = 1 + int(products.device.to_host(mixer.lists.experts)[0])
        router_bytes = layers[0].router.num_bytes
        cases: list[tuple[str, Callable[[Layer, int], None], int]] = [
            ("route", mixer.route_few, router_bytes),
            ("gate|up", mixer.gate_up, num_experts * gate_up_bytes),
            ("down", mixer.down, num_experts * down_bytes),
            (
                "layer",
                mixer.decode_layer,
                num_experts * (gate_up_bytes + down_bytes) + router_bytes,
            ),
        ]
        for name, job, num_bytes in cases:
            mixer.route_few(layers[0], rows)
            job(layers[0], rows)
            jobs = [partial(job, layer, rows) for layer in layers * 4]
            us = products.median_ms(partial(run_all, jobs)) / len(jobs) * 1e3
            limit = num_bytes / gbps / 1e3
            print(
                f"decode  {name:8} rows={rows:2} {num_experts:3} experts {us:7.2f} us, "
                f"limit {limit:6.2f}, {num_bytes / us / 1e3:5.0f} GB/s"
            )
            results.append({"kernel": name, "rows": rows, "us": us, "limit_us": limit})
    return results


def prefill(
    products: Products, mixer: Mixer, layers: list[Layer], sizes: ModelSizes, gbps: float
) -> list[Row]:
    """Routing alone and a whole layer; operations of the experts, empty columns not counted."""
    results: list[Row] = []
    all_bytes = sum(layers[0].expert_bytes()) * (sizes.experts + 1)
    for rows in MANY_ROWS:
        work = 6 * rows * sizes.hidden
        work *= sizes.experts_used * sizes.expert_dim + sizes.shared_dim
        limit = max(work / TFLOPS / 1e6, all_bytes / gbps / 1e3)
        for name, job in (("route", mixer.route_many), ("layer", mixer.prefill_layer)):
            job(layers[0], rows)
            jobs = [partial(job, layer, rows) for layer in layers]
            us = products.median_ms(partial(run_all, jobs), 5) / len(jobs) * 1e3
            print(
                f"prefill {name:8} rows={rows:4} {us:8.1f} us, limit {limit:6.1f}, "
                f"{work / us / 1e6:4.0f} TFLOP/s, {sizes.layers} layers "
                f"{rows / (us * sizes.layers) * 1e6:7.0f} tok/s"
            )
            results.append({"kernel": name, "rows": rows, "us": us, "limit_us": limit})
    return results


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="moe", description="Time experts on the GPU.")
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--size", default="35b-a3b", choices=[s for s in SIZES if SIZES[s].experts])
    parser.add_argument("--formats", nargs=3, default=["q4_k", "q4_k", "q6_k"], metavar="FORMAT")
    given = parser.parse_args()
    formats = [name.upper() for name in given.formats]
    assert all(name in FORMATS for name in formats), sorted(FORMATS)
    sizes, products = SIZES[given.size], Products()
    gbps = products.read_rate()
    print(f"{products.device.name}: read {gbps:.0f} GB/s; {given.size}, {' '.join(formats)}")
    layers = [Layer(products, sizes, formats) for _ in range(LAYERS)]
    mixer = Mixer(products, sizes)
    rows = decode(products, mixer, layers, gbps)
    rows += prefill(products, mixer, layers, sizes, gbps)
    if given.results is not None:
        record = {"card": products.device.name, "read_gbps": gbps, "size": given.size, "rows": rows}
        given.results.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
