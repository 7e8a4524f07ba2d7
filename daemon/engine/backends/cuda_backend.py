"""The GPU: the operations of `backend.Backend`, each calling our kernels.

Activations: the residual stream is float32 `[rows, hidden]`; operands of products are fp16, made by
`rms_norm` or on the way into `add_project`. A decode batch is padded to a bucket, recorded once as
a CUDA graph and replayed. Prefill always takes the kernels for many rows, however few there are,
so that a row's bits do not depend on the batch. Engine thread only.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import numpy as np

from daemon.checkpoint import HostBytes
from daemon.engine.backends.backend import Contents, HostBuffers, Sampled, SamplingRow, Writing
from daemon.engine.backends.cuda_experts import ExpertMixer
from daemon.engine.backends.cuda_memory import (
    BUCKETS,
    CudaLimits,
    SequenceMemory,
    Workspace,
)
from daemon.engine.backends.cuda_run import (
    DecodeRun,
    DecodeTables,
    PrefillArrays,
    PrefillRun,
)
from daemon.engine.backends.cuda_weights import CudaMatrix, CudaTable, WeightLoader
from daemon.engine.batch import Batch
from daemon.engine.memory.memory_plan import PAGES, STATES, WORKSPACE, MemoryPlan, Room
from daemon.engine.model.shape import ModelShape
from daemon.engine.model.weights import AttentionWeights, DeltaNetWeights, ExpertWeights
from daemon.engine.requests import TokenLogprobs
from daemon.engine.weights.gguf import Tensor
from daemon.kernels.attention_decode import AttentionDecode
from daemon.kernels.attention_prefill import AttentionPrefill
from daemon.kernels.delta_prefill import DeltaPrefill
from daemon.kernels.delta_state import DeltaConstants, DeltaInputs, DeltaTypes
from daemon.kernels.delta_step import DeltaStep
from daemon.kernels.kv_append import KvAppend
from daemon.kernels.kv_format import HEAD_DIM
from daemon.kernels.moe_pack import ExpertMatrix, GatedExperts
from daemon.kernels.quant_activations import CHUNKS, PANELS, ActivationKernels, padded_tokens
from daemon.kernels.quant_gemm import GemmKernels
from daemon.kernels.quant_gemv import ADD, STORE, SWIGLU, GemvKernels
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.copy_lane import CopyLane
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.graph import Graph
from daemon.kernels.runtime.pinned_pool import PinnedPool
from daemon.kernels.sample import Choice, Sample

F32, F16 = ElementType.F32, ElementType.F16
Run = DecodeRun | PrefillRun
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Logits = DeviceArray | Float32
"""Of the rows to sample from on the device, in the workspace; of a whole text on the host."""


class Operand(NamedTuple):
    """fp16 rows ready to be multiplied: `array` in layout PANELS (decode) or CHUNKS (prefill)."""

    array: DeviceArray
    num_rows: int
    layout: int


class CudaBackend:
    """Fulfils `backend.Backend` on one GPU."""

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        limits: CudaLimits,
        rms_eps: float,
        plan: MemoryPlan | None = None,
    ) -> None:
        self._plan = plan
        if plan is not None:
            device.reserve(plan.regions)
        self._device = device
        self._compiler = compiler
        self._limits = limits
        self._eps = rms_eps
        self._convert = ActivationKernels(device, compiler)
        self._gemv = GemvKernels(device, compiler)
        self._gemm = GemmKernels(device, compiler)
        self._loader = WeightLoader(device, compiler, self._gemv, self._gemm)
        self._pool = PinnedPool(device, limits.pinned_bytes)
        self._lanes = CopyLane(device, "saving"), CopyLane(device, "restoring")
        self._graphs: dict[int, Graph] = {}
        self._warm: set[int] = set()
        self._mixer: ExpertMixer | None = None
        self._operand_layout = PANELS

    @property
    def name(self) -> str:
        """The card."""
        return f"{self._device.name} ({self._device.arch})"

    @property
    def numerics(self) -> str:
        """The card's architecture, how work is dealt to it, and the formats of keys and values."""
        formats = f"{self._limits.k_format.name}/{self._limits.v_format.name}"
        return f"cuda {self._device.arch}; {self._device.num_sms} SMs; KV {formats}; kernels 4"

    @property
    def overlaps(self) -> bool:
        """Launches are asynchronous."""
        return True

    def wait(self) -> None:
        """For the stream of the steps; copies go on."""
        self._device.synchronize()

    def attach(self) -> None:
        """Make the GPU current in the engine's thread."""
        self._device.use_here()

    # ── weights ───────────────────────────────────────────────────────────────────────────────

    def matrix(self, parts: Sequence[Tensor]) -> CudaMatrix:
        """See `WeightLoader.matrix`."""
        return self._loader.matrix(parts)

    def gated_matrix(self, gate: Tensor, up: Tensor) -> CudaMatrix:
        """See `WeightLoader.gated_matrix`."""
        return self._loader.gated_matrix(gate, up)

    def table(self, tensor: Tensor) -> CudaTable:
        """See `WeightLoader.table`."""
        return self._loader.table(tensor)

    def tied_table(self, tensor: Tensor) -> tuple[CudaTable, CudaMatrix]:
        """See `WeightLoader.tied_table`."""
        return self._loader.tied_table(tensor)

    def vector(self, tensor: Tensor) -> DeviceArray:
        """See `WeightLoader.vector`."""
        return self._loader.vector(tensor)

    def router(self, parts: Sequence[Tensor]) -> DeviceArray:
        """See `WeightLoader.router`."""
        return self._loader.router(parts)

    def experts(self, tensor: Tensor) -> ExpertMatrix:
        """See `WeightLoader.experts`."""
        return self._loader.experts(tensor)

    def gated_experts(self, parts: Sequence[Tensor]) -> GatedExperts:
        """See `WeightLoader.gated_experts`."""
        return self._loader.gated_experts(parts)

    # ── memory ────────────────────────────────────────────────────────────────────────────────

    def fit(self, wanted_pages: int) -> Room:
        """What was planned for."""
        return Room(wanted_pages) if self._plan is None else self._plan.room

    def allocate(self, shape: ModelShape, num_slots: int, num_pages: int) -> None:
        """States, pages, and the workspace of a step."""
        self._loader.finish()
        # Recorded graphs hold the addresses of what was allocated before.
        self._graphs.clear()
        self._warm.clear()
        self.shape = shape
        device, limits = self._device, self._limits
        if device.computes:
            # Copies into what was allocated before.
            for lane in self._lanes:
                lane.drain()
        for region in (STATES, PAGES, WORKSPACE):
            device.clear(region)
        self._memory = SequenceMemory(
            device, shape, limits, num_slots, num_pages, self._pool, self._lanes
        )
        with device.region(WORKSPACE):
            self._space = Workspace(device, shape, limits, self._loader.stacked_columns)
            self._decode_tables = DecodeTables(device, limits.decode_rows, limits.max_pages)
            frequencies = np.asarray(shape.rope.frequencies)
            self._frequencies = device.to_device(frequencies.view(np.uint64))
            self._make_kernels(shape)
            self._prefill_arrays = PrefillArrays(
                device, self._attention_prefill.dealer,
                limits.max_rows, limits.max_sequences, limits.max_pages,
            )  # fmt: skip
        if device.computes:
            self._compiler.finish()

    @property
    def snapshot_sizes(self) -> tuple[int, int]:
        """As they lie in device memory."""
        return self._memory.slots.memory.shape[1], self._memory.layout.page_bytes

    def host_buffer(self, num_bytes: int) -> memoryview:
        """Pinned, where one is at hand."""
        return self._pool.take(num_bytes)

    @property
    def host_buffers(self) -> HostBuffers:
        """Those of the pool."""
        return HostBuffers(self._pool.pinned_bytes, self._pool.num_unpinned)

    def clear_slot(self, slot: int) -> None:
        """The state before the first token is zero."""
        self._memory.clear_slot(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Within the device, in the stream's order."""
        self._memory.copy_slot(source, target)

    def begin_read(self, slot: int, pages: Sequence[int]) -> Future[Contents]:
        """Beside the stream, see `SnapshotTransfers`."""
        return self._memory.transfers.begin_read(slot, pages)

    def begin_write(self, slot: int, state: HostBytes, pages: Mapping[int, HostBytes]) -> Writing:
        """Beside the stream, layer by layer, see `SnapshotTransfers`."""
        return self._memory.transfers.begin_write(slot, state, pages)

    # ── one step ──────────────────────────────────────────────────────────────────────────────

    def evaluate(self, batch: Batch, forward: Callable[[Run], Logits]) -> Logits:
        """Prefill calls the operations; decode records them per bucket and replays."""
        transfers = self._memory.transfers
        transfers.before_step(batch)
        try:
            return self._step(batch, forward)
        finally:
            transfers.after_step()

    def _step(self, batch: Batch, forward: Callable[[Run], Logits]) -> Logits:
        self._operand_layout = PANELS if batch.kind == "decode" else CHUNKS
        if batch.kind == "prefill":
            return forward(self._prefill_arrays.run(batch))
        bucket = next(size for size in BUCKETS if size >= len(batch.spans))
        self._decode_tables.fill(batch.spans)
        run = self._decode_tables.run(bucket)
        if bucket not in self._warm:
            # The first batch runs as it is: kernels are compiled then, which no recording may do.
            self._warm.add(bucket)
            forward(run)
        else:
            if bucket not in self._graphs:
                self._graphs[bucket] = Graph(self._device, lambda: _discard(forward(run)))
            self._graphs[bucket].replay()
        return self._space.logits.rows(0, len(batch.spans))

    def embed(self, run: Run, table: CudaTable) -> DeviceArray:
        """Float32, the beginning of the residual stream."""
        x = self._space.residual.rows(0, run.num_rows)
        table.kernel(table.rows, run.tokens, x)
        return x

    def rms_norm(self, x: DeviceArray, weight: DeviceArray) -> Operand:
        """The norm, rounded to fp16 for the product that follows."""
        return self._operand(x, self._space.narrow, self._operand_layout, weight)

    def project(self, matrix: CudaMatrix, x: Operand) -> DeviceArray:
        """`[rows, matrix rows]`: float32 in decode, fp16 in prefill, which mixers read faster."""
        return self._project(matrix, x, F32 if x.layout == PANELS else F16)

    def add_project(self, matrix: CudaMatrix, x: Operand, residual: DeviceArray) -> DeviceArray:
        """In the residual's place."""
        self._multiply(matrix, x, residual, ADD)
        return residual

    def project_gated(self, matrix: CudaMatrix, x: Operand) -> Operand:
        """An fp16 operand again, for the product that follows."""
        out = self._space.wide.view((padded_tokens(x.num_rows), matrix.rows // 2))
        if matrix.is_paired:
            self._multiply(matrix, x, out, SWIGLU)
        else:
            self._convert.gate(self._project(matrix, x, F32), out, x.layout)
        return Operand(out, x.num_rows, x.layout)

    def delta_net(self, run: Run, layer: int, weights: DeltaNetWeights, x: DeviceArray) -> Operand:
        """One fused kernel in decode; prepare, scan and gate in prefill."""
        self._memory.transfers.before_layer("delta_net", layer)
        slots = self._memory.slots
        inputs = DeltaInputs.of_rows(x, slots.sizes)
        constants = DeltaConstants(weights.conv, weights.decay, weights.dt_bias, weights.gated_norm)
        out = self._space.wide.view((padded_tokens(run.num_rows), slots.sizes.value_size))
        if isinstance(run, DecodeRun):
            places = (run.slots, run.captures, run.positions)
            self._delta_step(inputs, constants, slots, layer, *places, out, dependent=True)
        else:
            self._delta_prefill(inputs, constants, slots, layer, run.tables, out)
        return Operand(out, run.num_rows, self._operand_layout)

    def attention(self, run: Run, layer: int, weights: AttentionWeights, x: DeviceArray) -> Operand:
        """Append, then attend: split over keys in decode, over query tiles in prefill."""
        self._memory.transfers.before_layer("attention", layer)
        heads = (run.num_rows, self.shape.attention.num_heads, HEAD_DIM)
        queries = self._space.queries.view(heads)
        self._kv_append[x.dtype](
            x, run.positions, run.sequences, run.page_table, self._memory.pool, layer, queries,
            (weights.q_norm, weights.k_norm), self._frequencies, self.shape.rope.magnitude,
            self._eps, dependent=isinstance(run, DecodeRun),
        )  # fmt: skip
        out = self._space.wide.view((padded_tokens(run.num_rows), heads[1] * HEAD_DIM))
        place = (run.page_table, self._memory.pool, layer, out)
        if isinstance(run, DecodeRun):
            self._attention_decode(queries, x, run.positions, *place, dependent=True)
        else:
            self._attention_prefill(queries, x, run.items, run.merges, *place)
        return Operand(out, run.num_rows, self._operand_layout)

    def mix_experts(self, weights: ExpertWeights, residual: DeviceArray) -> DeviceArray:
        """In the residual's place."""
        assert self._mixer is not None
        is_decoding = self._operand_layout == PANELS
        mix = self._mixer.mix_few if is_decoding else self._mixer.mix_many
        mix(weights, residual)
        return residual

    def logits(
        self,
        run: Run,
        norm: DeviceArray,
        head: CudaMatrix,
        x: DeviceArray,
        rows: Literal["last", "all"],
    ) -> Logits:
        """By the kernel for few rows, always: a prompt's last row has the bits of decode."""
        if rows == "all":
            return self._logits_of_all(norm, head, x)
        wanted = range(run.num_rows) if isinstance(run, DecodeRun) else run.last_rows
        if isinstance(run, PrefillRun):
            picked = self._space.picked.rows(0, len(wanted))
            for target, source in enumerate(wanted):
                self._device.copy(picked.rows(target, target + 1), x.rows(source, source + 1))
            x = picked
        logits = self._space.logits.rows(0, len(wanted))
        if wanted:
            self._head(norm, head, x, logits)
        return logits

    def _logits_of_all(self, norm: DeviceArray, head: CudaMatrix, x: DeviceArray) -> Float32:
        """On the host, some rows at a time: those of a long text may exceed the GPU's memory."""
        groups, step = [], self._limits.decode_rows
        for first in range(0, x.shape[0], step):
            rows = x.rows(first, min(first + step, x.shape[0]))
            logits = self._space.logits.rows(0, rows.shape[0])
            self._head(norm, head, rows, logits)
            groups.append(self._device.to_host(logits))
        return np.concatenate(groups)

    def logits_to_host(self, logits: Logits) -> Float32:
        """Waits."""
        return self._device.to_host(logits) if isinstance(logits, DeviceArray) else logits

    def sample(
        self, logits: DeviceArray, rows: Sequence[SamplingRow], num_tokens: int
    ) -> list[Sampled]:
        """On the device; one small copy comes back."""
        chosen = self._sample(logits, [_choice(row) for row in rows], num_tokens)
        return [
            Sampled(
                choice.token,
                None
                if row.params.logprobs is None
                else TokenLogprobs(choice.logprob, choice.alternatives),
            )
            for choice, row in zip(chosen, rows, strict=True)
        ]

    # ── the parts of it ───────────────────────────────────────────────────────────────────────

    def _head(self, norm: DeviceArray, head: CudaMatrix, x: DeviceArray, out: DeviceArray) -> None:
        operand = self._operand(x, self._space.narrow, PANELS, norm)
        self._multiply(head, operand, out, STORE)

    def _operand(
        self, x: DeviceArray, memory: DeviceArray, layout: int, norm: DeviceArray | None = None
    ) -> Operand:
        array = memory.view((padded_tokens(x.shape[0]), x.shape[1]))
        self._convert.convert(x, array, layout, norm, self._eps)
        return Operand(array, x.shape[0], layout)

    def _project(self, matrix: CudaMatrix, x: Operand, dtype: ElementType) -> DeviceArray:
        out = self._space.projected.view((x.num_rows, matrix.rows), dtype)
        self._multiply(matrix, x, out, STORE)
        return out

    def _multiply(self, matrix: CudaMatrix, x: Operand, out: DeviceArray, epilogue: int) -> None:
        if x.layout == PANELS:
            self._gemv.multiply(matrix.gemv, x.array, x.num_rows, out, epilogue)
        else:
            self._gemm.multiply(matrix.gemm, x.array, x.num_rows, out, epilogue)

    def _make_kernels(self, shape: ModelShape) -> None:
        common, layout = (self._device, self._compiler), self._memory.layout
        max_rows = self._limits.decode_rows
        sizes, heads = self._memory.slots.sizes, shape.attention.num_heads
        self._delta_step = DeltaStep(*common, sizes, DeltaTypes(F32, F16), self._eps)
        self._delta_prefill = DeltaPrefill(
            *common, sizes, DeltaTypes(F16, F16), self._eps, self._space.scratch
        )
        self._kv_append = {dtype: KvAppend(*common, layout, dtype) for dtype in (F32, F16)}
        self._attention_decode = AttentionDecode(*common, layout, heads, max_rows, F32, F16)
        self._attention_prefill = AttentionPrefill(
            *common, layout, heads, F16, F16, self._space.scratch
        )
        self._sample = Sample(*common, shape.vocab_size, max_rows)
        if shape.experts is not None:
            self._mixer = ExpertMixer(*common, shape, shape.experts, self._limits.max_rows)


def _choice(row: SamplingRow) -> Choice:
    params = row.params
    return Choice(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        seed=row.seed,
        step=row.step,
        counts={token: replied for token, (_, replied) in row.counts.items()},
        biases=dict(params.logit_bias),
        num_alternatives=params.logprobs,
        mask=row.mask,
    )


def _discard(_: Logits) -> None:
    """A recording has no result: it is in the arrays that the launches write."""
