"""Launches the three kernels of a gated delta net layer in prefill: prepare, scan, gate.

Chunks lie on the absolute grid of 64 tokens; several sequences go through in one call. The kernels
are `delta_prepare.cu`, `delta_scan.cu` and `delta_gate.cu`; their tables are built here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.delta_state import (
    HEAD_DIM,
    DeltaConstants,
    DeltaInputs,
    DeltaSizes,
    DeltaSlots,
    DeltaTypes,
)
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Module

FOLDER = Path(__file__).parent
PREPARE, SCAN, GATE = (FOLDER / f"delta_{name}.cu" for name in ("prepare", "scan", "gate"))
PREPARE_PARAMETERS = ("pointer",) * 8 + ("int32",) * 2 + ("int64",) + ("int32",) * 2
SCAN_PARAMETERS = ("pointer",) * 6 + ("int32",) + ("int64",) * 2 + ("int32",) * 2
GATE_PARAMETERS = ("pointer",) * 5 + ("int32",) * 4 + ("float32",)

CHUNK = 64
THREADS = 128
PANEL_BYTES = CHUNK * CHUNK * 2
TILE_BYTES = 2 * PANEL_BYTES
DECAY_BYTES = 2 * CHUNK * 4
GRAM_BYTES = CHUNK * (CHUNK + 4) * 4

Int32 = np.ndarray[Any, np.dtype[np.int32]]


class PrefillSpan(NamedTuple):
    """Consecutive tokens of one sequence, from a multiple of 64 on.

    `captures` are (tokens after the span's start, slot): a multiple of 64 at most the span's
    length, where the slot gets a copy of the state.
    """

    first_row: int
    num_tokens: int
    slot: int
    captures: tuple[tuple[int, int], ...] = ()


class PrefillTables(NamedTuple):
    """The kernels' tables on the device: i32 `[chunks, 4]` and `[spans, 4]`."""

    chunks: DeviceArray
    spans: DeviceArray


def chunk_tables(spans: Sequence[PrefillSpan]) -> tuple[Int32, Int32]:
    """Rows of ChunkEntry and SpanEntry (include/delta_tiles.cuh)."""
    chunks: list[tuple[int, int, int, int]] = []
    lines: list[tuple[int, int, int, int]] = []
    for span in spans:
        captured = dict(span.captures)
        assert all(0 < at <= span.num_tokens and at % CHUNK == 0 for at in captured)
        starts = range(0, span.num_tokens, CHUNK)
        lines.append((len(chunks), len(starts), span.slot, 0))
        for start in starts:
            rows = min(CHUNK, span.num_tokens - start)
            history = span.slot if start == 0 else -1
            capture = captured.get(start + CHUNK, -1)
            chunks.append((span.first_row + start, rows, history, capture))
    return np.array(chunks, np.int32).reshape(-1, 4), np.array(lines, np.int32).reshape(-1, 4)


def workspace_bytes(sizes: DeltaSizes, num_chunks: int) -> int:
    """Device memory that a call with so many chunks needs: 2.1 MB a chunk for the 27B."""
    head = 2 * TILE_BYTES
    return num_chunks * (sizes.num_k_heads * head + sizes.num_v_heads * (head + DECAY_BYTES))


def scan_depth(shared_bytes_per_block: int) -> int:
    """Chunks whose operands lie in shared memory at once: as many as fit, up to three."""
    return max(n for n in (1, 2, 3) if n == 1 or scan_shared_bytes(n) <= shared_bytes_per_block)


def scan_shared_bytes(depth: int) -> int:
    """The scan's shared memory: keys and decays at least twice; queries, values, T and S."""
    keys = max(2, depth) * (TILE_BYTES + DECAY_BYTES)
    return keys + depth * (TILE_BYTES + 3 * PANEL_BYTES)


def scan_warps(sizes: DeltaSizes, arch: str, num_sms: int) -> int:
    """Warps per block. Hopper's products take four; elsewhere fewer warps fill the card better
    when heads are few, with the same bits."""
    if arch == "sm_90a":
        return 4
    for warps in (4, 2):
        if sizes.value_size // (warps * 16) >= num_sms // 2:
            return warps
    return 1


class DeltaPrefill:
    """The kernels for one model, and the workspace for `max_chunks` chunks a call."""

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        sizes: DeltaSizes,
        types: DeltaTypes,
        norm_eps: float,
        workspace: DeviceArray,
    ) -> None:
        self._stream, self._sizes, self._norm_eps = device.stream, sizes, norm_eps
        self._workspace = workspace
        self._warps = scan_warps(sizes, device.arch, device.num_sms)
        depth = scan_depth(device.shared_bytes_per_block)
        self._scan_shared = scan_shared_bytes(depth)
        group = sizes.num_v_heads // sizes.num_k_heads
        self._prepare_shared = 2 * TILE_BYTES + GRAM_BYTES + group * 2 * CHUNK * 4
        prepare, gate = (compiler.cubin(source, types.defines) for source in (PREPARE, GATE))
        scan = compiler.cubin(SCAN, {**types.defines, "SCAN_WARPS": self._warps, "DEPTH": depth})
        self._prepare = Module(prepare).kernel(
            "delta_prepare", PREPARE_PARAMETERS, self._prepare_shared
        )
        self._scan = Module(scan).kernel("delta_scan", SCAN_PARAMETERS, self._scan_shared)
        self._gate = Module(gate).kernel("delta_gate", GATE_PARAMETERS)

    def __call__(
        self,
        inputs: DeltaInputs,
        constants: DeltaConstants,
        states: DeltaSlots,
        layer: int,
        tables: PrefillTables,
        output: DeviceArray,
        dependent: bool = False,
    ) -> None:
        """Advance each span's slot over its rows and fill its captures.

        Args:
            tables: from `chunk_tables`; written at least two launches before.
            output: `[rows, v_heads * 128]`, or an operand `[padded rows, v_heads * 128]`; rows of
                the spans are written.
            dependent: start before the previous kernel has ended. (Scan and gate do not: blocks
                that wait take the place of blocks that work.)
        """
        assert output.shape[1:] == (self._sizes.value_size,)
        assert workspace_bytes(self._sizes, tables.chunks.shape[0]) <= self._workspace.num_bytes
        self.prepare(inputs, constants, states, layer, tables, dependent)
        self.scan(inputs, states, layer, tables)
        self.gate(inputs, constants, tables, output)

    def prepare(
        self,
        inputs: DeltaInputs,
        constants: DeltaConstants,
        states: DeltaSlots,
        layer: int,
        tables: PrefillTables,
        dependent: bool = False,
    ) -> None:
        """All that does not depend on the state, into the workspace."""
        rings, ring_stride = states.rings(layer)
        self._prepare.launch(
            self._stream,
            (self._sizes.num_k_heads, tables.chunks.shape[0], 1),
            (THREADS, 1, 1),
            *(inputs.qkv.address, inputs.gates.address),
            *(constants.taps, constants.rates, constants.dt_bias),
            *(rings, tables.chunks, self._workspace),
            *(inputs.qkv.stride, inputs.gates.stride, ring_stride),
            *self._sizes,
            shared_bytes=self._prepare_shared,
            dependent=dependent,
        )

    def scan(
        self, inputs: DeltaInputs, states: DeltaSlots, layer: int, tables: PrefillTables
    ) -> None:
        """States and outputs, chunk after chunk."""
        rules, rule_stride = states.rules(layer)
        rings, ring_stride = states.rings(layer)
        blocks_per_head = HEAD_DIM // (16 * self._warps)
        self._scan.launch(
            self._stream,
            (self._sizes.num_v_heads * blocks_per_head, tables.spans.shape[0], 1),
            (32 * self._warps, 1, 1),
            *(inputs.qkv.address, rules, rings, *tables, self._workspace),
            *(inputs.qkv.stride, rule_stride, ring_stride),
            *self._sizes,
            shared_bytes=self._scan_shared,
        )

    def gate(
        self,
        inputs: DeltaInputs,
        constants: DeltaConstants,
        tables: PrefillTables,
        output: DeviceArray,
    ) -> None:
        """Norm and gate of the outputs, from the workspace."""
        self._gate.launch(
            self._stream,
            (self._sizes.num_v_heads, tables.chunks.shape[0], 1),
            (THREADS, 1, 1),
            *(inputs.z.address, constants.norm, tables.chunks, self._workspace, output),
            *(output.shape[0], inputs.z.stride, *self._sizes, self._norm_eps),
        )
