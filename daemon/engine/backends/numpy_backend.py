"""The reference backend: every operation in NumPy, float32, obvious and complete.

Activations are `[blocks, rows, columns]`: a block is one chunk of 64 rows in prefill and one row in
decode. Each block is one matrix product of a fixed size, which is what makes rows invariant: BLAS
gives the same bits for the same shape.

Engine thread only, with threads of its own for the blocks of a prompt. BLAS is held to one thread:
its own ones wait in a spin, and a busy machine then makes them twenty times slower than one alone.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from threadpoolctl import threadpool_limits

from daemon.checkpoint import PAGE_TOKENS, HostBytes
from daemon.engine import sampler
from daemon.engine.backends import numpy_attention, numpy_delta_net, numpy_experts
from daemon.engine.backends.backend import Contents, Sampled, SamplingRow, Writing
from daemon.engine.backends.numpy_attention import AttentionConstants, KVPool
from daemon.engine.backends.numpy_delta_net import (
    DeltaNetConstants,
    DeltaNetState,
    Float32,
    PreparedChunks,
)
from daemon.engine.batch import Batch, Span
from daemon.engine.memory.memory_plan import Room
from daemon.engine.model.shape import ModelShape
from daemon.engine.model.weights import AttentionWeights, DeltaNetWeights, ExpertWeights
from daemon.engine.weights.gguf import Tensor
from daemon.engine.weights.quant_formats import dequantize
from daemon.errors import OutOfDeviceMemory


class NumpyRun(Struct, frozen=True):
    """One batch, padded to whole blocks.

    `tokens` is `[blocks, rows]`; span i owns blocks `blocks[i]`; `rotations[i]` are its sines.
    """

    batch: Batch
    tokens: np.ndarray[Any, np.dtype[np.int32]]
    blocks: tuple[slice, ...]
    rotations: tuple[tuple[Float32, Float32], ...]


class NumpyBackend:
    """Fulfils `backend.Backend`. Weights are kept as float32, transposed for `x @ w`."""

    def __init__(self, rms_eps: float) -> None:
        self.rms_eps = rms_eps
        threadpool_limits(1, user_api="blas")
        self._num_threads = len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="numpy")

    @property
    def name(self) -> str:
        """Device and library, for people."""
        return f"CPU, NumPy {np.__version__}"

    @property
    def numerics(self) -> str:
        """NumPy, its BLAS and the vector extensions that they found decide the last bits."""
        config = np.show_config(mode="dicts")
        assert isinstance(config, dict)
        blas = config["Build Dependencies"]["blas"]
        extensions = ",".join(config["SIMD Extensions"]["found"])
        return f"numpy {np.__version__}; {blas['name']} {blas['version']}; {extensions}; layout 3"

    @property
    def overlaps(self) -> bool:
        """Everything is done when a call returns."""
        return False

    def wait(self) -> None:
        """There is nothing to wait for."""

    def attach(self) -> None:
        """NumPy runs on any thread."""

    def matrix(self, parts: Sequence[Tensor]) -> Float32:
        """`[columns, sum of rows]`."""
        stacked = [dequantize(part.data, part.format, part.shape) for part in parts]
        return np.ascontiguousarray(np.concatenate(stacked).T)

    def gated_matrix(self, gate: Tensor, up: Tensor) -> Float32:
        """Columns of gate, then of up."""
        return self.matrix([gate, up])

    def table(self, tensor: Tensor) -> Float32:
        """`[rows, columns]`."""
        return dequantize(tensor.data, tensor.format, tensor.shape)

    def tied_table(self, tensor: Tensor) -> tuple[Float32, Float32]:
        """A table, and a view of it."""
        table = self.table(tensor)
        return table, table.T

    def vector(self, tensor: Tensor) -> Float32:
        """As it is in the file."""
        return dequantize(tensor.data, tensor.format, tensor.shape)

    def router(self, parts: Sequence[Tensor]) -> Float32:
        """`[columns, sum of rows]`."""
        return self.matrix(parts)

    def experts(self, tensor: Tensor) -> Float32:
        """`[experts, columns, rows]`."""
        return self.gated_experts([tensor])

    def gated_experts(self, parts: Sequence[Tensor]) -> Float32:
        """`[experts, columns, rows of gate, then of up]`."""
        stacked = [dequantize(part.data, part.format, part.shape) for part in parts]
        return np.ascontiguousarray(np.concatenate(stacked, axis=1).transpose(0, 2, 1))

    def allocate(self, shape: ModelShape, num_slots: int, num_pages: int) -> None:
        """Slots as `[slots, layers, …]`, pages as `KVPool` has them; untouched memory is free."""
        sizes = shape.delta_net
        layers = shape.num_delta_layers
        try:
            self.rules = np.zeros(
                (num_slots, layers, sizes.num_v_heads, sizes.k_dim, sizes.v_dim), np.float32
            )
            self.convs = np.zeros(
                (num_slots, layers, sizes.conv_width - 1, sizes.conv_dim), np.float32
            )
            self.pool = KVPool(shape.num_attention_layers, shape.attention, num_pages)
        except MemoryError as error:
            raise OutOfDeviceMemory(
                f"no memory for {num_pages * PAGE_TOKENS} tokens of KV and {num_slots} states; "
                "ask for a shorter --ctx or fewer --parallel"
            ) from error
        self.shape = shape

    def fit(self, wanted_pages: int) -> Room:
        """All of them: pages that are never touched take no memory. States inside messages lie in
        the store's memory, which is the same."""
        return Room(wanted_pages)

    @property
    def snapshot_sizes(self) -> tuple[int, int]:
        """Float32 both."""
        return self.rules[0].nbytes + self.convs[0].nbytes, self.pool.content[:, :, 0].nbytes

    def host_buffer(self, num_bytes: int) -> memoryview:
        """Ordinary memory."""
        return np.empty(num_bytes, np.uint8).data

    @property
    def host_buffers(self) -> None:
        """Nothing is pinned."""
        return None

    def clear_slot(self, slot: int) -> None:
        """The state before the first token is zero."""
        self.rules[slot] = 0
        self.convs[slot] = 0

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a recurrent state."""
        self.rules[target] = self.rules[source]
        self.convs[target] = self.convs[source]

    def begin_read(self, slot: int, pages: Sequence[int]) -> Future[Contents]:
        """Rule states of all layers, then convolution rows; pages as `KVPool` has them. At once."""
        state = self.rules[slot].tobytes() + self.convs[slot].tobytes()
        contents: list[HostBytes] = [self.pool.content[:, :, page].tobytes() for page in pages]
        read: Future[Contents] = Future()
        read.set_result(Contents(state, contents))
        return read

    def begin_write(self, slot: int, state: HostBytes, pages: Mapping[int, HostBytes]) -> Writing:
        """The inverse of `begin_read`, at once."""
        values = np.frombuffer(state, np.float32)
        assert values.size == self.rules[slot].size + self.convs[slot].size
        rules, convs = np.split(values, [self.rules[slot].size])
        self.rules[slot] = rules.reshape(self.rules[slot].shape)
        self.convs[slot] = convs.reshape(self.convs[slot].shape)
        for page, content in pages.items():
            target = self.pool.content[:, :, page]
            target[:] = np.frombuffer(content, np.float32).reshape(target.shape)
        return Writing.finished()

    def evaluate(self, batch: Batch, forward: Callable[[NumpyRun], Float32]) -> Float32:
        """Nothing is recorded: every batch calls the operations."""
        return forward(self._begin(batch))

    def _begin(self, batch: Batch) -> NumpyRun:
        """Pad spans to whole blocks and compute their rotations."""
        rows = PAGE_TOKENS if batch.kind == "prefill" else 1
        tokens, blocks, rotations = [], [], []
        first = 0
        for span in batch.spans:
            num_blocks = -(-len(span.tokens) // rows)
            padded = np.zeros(num_blocks * rows, np.int32)
            padded[: len(span.tokens)] = span.tokens
            tokens.append(padded.reshape(num_blocks, rows))
            blocks.append(slice(first, first + num_blocks))
            positions = span.start + np.arange(num_blocks * rows).reshape(num_blocks, rows)
            rotations.append(numpy_attention.rotation_table(self.shape.rope, positions))
            first += num_blocks
        return NumpyRun(batch, np.concatenate(tokens), tuple(blocks), tuple(rotations))

    def embed(self, run: NumpyRun, table: Float32) -> Float32:
        """`[blocks, rows, hidden]`; padding rows hold token 0."""
        return table[run.tokens]

    def rms_norm(self, x: Float32, weight: Float32) -> Float32:
        """Over the last axis."""
        return numpy_delta_net.rms_norm(x, weight, self.rms_eps)

    def project(self, matrix: Float32, x: Float32) -> Float32:
        """One product of a fixed size a block."""
        out = np.empty((*x.shape[:2], matrix.shape[1]), np.float32)
        self._for_each(lambda block: np.matmul(x[block], matrix, out=out[block]), len(x))
        return out

    def add_project(self, matrix: Float32, x: Float32, residual: Float32) -> Float32:
        """residual + x Wᵀ, in the residual's place."""

        def add_block(block: int) -> None:
            residual[block] += np.matmul(x[block], matrix)

        self._for_each(add_block, len(x))
        return residual

    def delta_net(self, run: NumpyRun, layer: int, weights: DeltaNetWeights, x: Float32) -> Float32:
        """Chunked on the grid in prefill, one recurrent step in decode."""
        sizes = self.shape.delta_net
        constants = DeltaNetConstants(
            weights.conv.T, weights.decay, weights.dt_bias, weights.gated_norm, self.rms_eps
        )
        out = np.empty((*x.shape[:2], sizes.value_size), np.float32)
        for span, blocks in zip(run.batch.spans, run.blocks, strict=True):
            if run.batch.kind == "decode":
                state = self._state(span.slot, layer)
                out[blocks] = numpy_delta_net.step(sizes, constants, state, x[blocks][0, 0])
            else:
                self._delta_net_span(constants, span, layer, x[blocks], out[blocks])
        return out

    def _delta_net_span(
        self, constants: DeltaNetConstants, span: Span, layer: int, rows: Float32, out: Float32
    ) -> None:
        """Chunks are prepared and gated in runs, one a thread; the scan between goes by heads."""
        sizes, state = self.shape.delta_net, self._state(span.slot, layer)
        num_chunks, width = len(rows), len(state.conv)
        qkv = rows[..., : sizes.conv_dim].reshape(-1, sizes.conv_dim)[: len(span.tokens)]
        history = np.concatenate([state.conv, qkv])
        past = np.stack([history[i * PAGE_TOKENS :][:width] for i in range(num_chunks)])
        ends = [min((i + 1) * PAGE_TOKENS, len(qkv)) for i in range(num_chunks)]
        captured = {capture.position - span.start: capture.slot for capture in span.captures}
        runs = _equal_runs(num_chunks, self._num_threads)
        prepared: list[PreparedChunks] = [None] * len(runs)  # type: ignore[list-item]
        raw = np.empty((num_chunks, sizes.num_v_heads, PAGE_TOKENS, sizes.v_dim), np.float32)

        def prepare(number: int) -> None:
            run = runs[number]
            count = ends[run.stop - 1] - (run.stop - 1) * PAGE_TOKENS
            prepared[number] = numpy_delta_net.prepare(
                sizes, constants, past[run], rows[run], count
            )

        def scan(head: int) -> None:
            for run, chunks in zip(runs, prepared, strict=True):
                for index in range(run.start, run.stop):
                    raw[index, head] = numpy_delta_net.scan(
                        state.rule[head], chunks, index - run.start, head
                    )
                    if ends[index] in captured:
                        self.rules[captured[ends[index]], layer, head] = state.rule[head]

        def gate(number: int) -> None:
            run = runs[number]
            out[run] = numpy_delta_net.gate(sizes, constants, raw[run], prepared[number].z)

        self._for_each(prepare, len(runs))
        self._for_each(scan, sizes.num_v_heads)
        self._for_each(gate, len(runs))
        state.conv[:] = history[ends[-1] : ends[-1] + width]
        for end, slot in captured.items():
            self.convs[slot, layer] = history[end : end + width]

    def attention(
        self, run: NumpyRun, layer: int, weights: AttentionWeights, x: Float32
    ) -> Float32:
        """Block by block over the pages of its own sequence."""
        sizes = self.shape.attention
        constants = AttentionConstants(weights.q_norm, weights.k_norm, self.rms_eps)
        out = np.empty((*x.shape[:2], sizes.num_heads * sizes.head_dim), np.float32)
        spans = zip(run.batch.spans, run.blocks, run.rotations, strict=True)
        for span, blocks, rotation in spans:
            out[blocks] = numpy_attention.attend(
                sizes, constants, self.pool, layer, span, x[blocks], rotation, self._for_each
            )
        return out

    def project_gated(self, matrix: Float32, x: Float32) -> Float32:
        """SiLU of the first half of the product's columns, times the second half."""
        out = np.empty((*x.shape[:2], matrix.shape[1] // 2), np.float32)

        def project_block(block: int) -> None:
            out[block] = numpy_experts.swiglu(np.matmul(x[block], matrix))

        self._for_each(project_block, len(x))
        return out

    def mix_experts(self, weights: ExpertWeights, residual: Float32) -> Float32:
        """residual + routed experts + shared expert, each from the normed residual."""
        sizes = self.shape.experts
        assert sizes is not None
        x = self.rms_norm(residual, weights.norm)
        rows = x.reshape(-1, x.shape[-1])
        scores = np.matmul(x, weights.router)
        routed = scores[..., : sizes.num_experts].reshape(len(rows), -1)
        chosen, shares = numpy_experts.route(routed, sizes.num_used)
        mixed = numpy_experts.routed(rows, weights.gate_up, weights.down, chosen, shares)
        residual += mixed.reshape(x.shape)
        if weights.shared is not None:
            gates = scores[..., sizes.num_experts :]
            residual += numpy_experts.shared(x, gates, *weights.shared)
        return residual

    def logits(
        self,
        run: NumpyRun,
        norm: Float32,
        head: Float32,
        x: Float32,
        rows: Literal["last", "all"],
    ) -> Float32:
        """Each row alone, as in decode: a prompt's last row is no special case."""
        flat = self.rms_norm(x, norm).reshape(-1, 1, x.shape[-1])
        chosen = np.concatenate(
            [
                self._rows_of(span, blocks, x.shape[1], rows)
                for span, blocks in zip(run.batch.spans, run.blocks, strict=True)
            ]
        )
        return np.matmul(flat[chosen], head)[:, 0]

    def logits_to_host(self, logits: Float32) -> Float32:
        """They are there already."""
        return logits

    def sample(
        self, logits: Float32, rows: Sequence[SamplingRow], num_tokens: int
    ) -> list[Sampled]:
        """Row by row."""
        return [
            sampler.sample(row_logits[:num_tokens], row)
            for row_logits, row in zip(logits, rows, strict=True)
        ]

    def _for_each(self, function: Callable[[int], object], num_blocks: int) -> None:
        """Call for every block; on all cores when there are blocks for them."""
        if num_blocks == 1 or self._num_threads == 1:
            for block in range(num_blocks):
                function(block)
            return
        for _ in self._threads.map(function, range(num_blocks)):
            pass

    def _state(self, slot: int, layer: int) -> DeltaNetState:
        return DeltaNetState(self.rules[slot, layer], self.convs[slot, layer])

    @staticmethod
    def _rows_of(
        span: Span, blocks: slice, block_rows: int, rows: Literal["last", "all"]
    ) -> np.ndarray[Any, Any]:
        first = blocks.start * block_rows
        end = first + len(span.tokens)
        if rows == "all":
            return np.arange(first, end)
        return np.arange(end - int(span.samples), end)


def _equal_runs(count: int, num_runs: int) -> list[slice]:
    """`range(count)` cut into at most `num_runs` runs of nearly equal length."""
    edges = np.linspace(0, count, min(count, num_runs) + 1).astype(int).tolist()
    return [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]
