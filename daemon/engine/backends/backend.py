"""What an engine needs of a device: some twenty operations, with their promises.

Two implementations: `numpy_backend` is the reference and the specification, `cuda_backend` the
fast one. Arrays, weights and runs are opaque handles that belong to the backend which made them.
Only the engine thread calls. Operations may be asynchronous; what returns host data waits.

**Row invariance.** The bits of every row depend on that row's sequence alone: not on which other
rows, spans or sequences are in the batch, nor on where a prompt was split, as long as prefill spans
start on the absolute grid of PAGE_TOKENS. Resumed equals cold and batched equals alone rest on it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
from msgspec import Struct

from daemon.checkpoint import HostBytes
from daemon.engine.batch import Batch
from daemon.engine.constraint import Mask
from daemon.engine.memory.memory_plan import Room
from daemon.engine.model.shape import ModelShape
from daemon.engine.model.weights import (
    AttentionWeights,
    DeltaNetWeights,
    ExpertWeights,
    Handle,
)
from daemon.engine.requests import SamplingParams, TokenLogprobs
from daemon.engine.weights.gguf import Tensor

Array = Any
"""Activations on the device. Shapes below leave out padding that a backend may add."""

Run = Any
"""One batch made ready: positions, page tables and places of its spans, on the device."""


class SamplingRow(Struct, frozen=True):
    """How to choose one row's next token.

    `step` counts the tokens sampled before; with the seed it fixes the random number. `counts`
    maps token ids to (occurrences in prompt and reply, occurrences in the reply alone), empty when
    no penalty asks for it. `mask` are the tokens that may be chosen, None: all.
    """

    params: SamplingParams
    seed: int
    step: int
    counts: dict[int, tuple[int, int]]
    mask: Mask | None = None


class Sampled(Struct, frozen=True):
    """A chosen token, and what was asked about the distribution it came from."""

    token: int
    logprobs: TokenLogprobs | None


class Contents(NamedTuple):
    """A snapshot on the host: a state, and pages in the order in which they were asked for."""

    state: HostBytes
    pages: list[HostBytes]


class HostBuffers(Struct, frozen=True):
    """Host memory that is pinned for snapshots, and how often a buffer was wanted and none of the
    pinned ones was ready: that one moved slowly."""

    pinned_bytes: int
    num_unpinned: int


class Writing:
    """A snapshot on its way to the device.

    Attributes:
        given: resolves when slot and pages may be used: what uses them waits, on the device, for
            the parts that it needs. Its exception: nothing there may be used.
        arrived: resolves when all has arrived.
        is_abandoned: what has not been copied need not be.
    """

    def __init__(self) -> None:
        self.given: Future[None] = Future()
        self.arrived: Future[None] = Future()
        self.is_abandoned = False

    def abandon(self) -> None:
        """Slot and pages will be used for something else; that waits for what is under way."""
        self.is_abandoned = True

    @classmethod
    def finished(cls) -> Self:
        """One that had arrived when it was asked for."""
        writing = cls()
        writing.given.set_result(None)
        writing.arrived.set_result(None)
        return writing


class Backend(Protocol):
    """See the module's docstring for threads and row invariance."""

    @property
    def name(self) -> str:
        """Device and library, for people."""
        ...

    @property
    def numerics(self) -> str:
        """Identity of the arithmetic: equal strings promise equal bits. Part of every hash."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether `logits` only begins a step, so that the host is free until `sample`."""
        ...

    def wait(self) -> None:
        """Until the steps that were begun are done.

        Raises:
            DeviceError: one of them has failed.
        """
        ...

    def attach(self) -> None:
        """Called once, on the engine's thread, before anything else is called there."""
        ...

    # ── weights: read once, kept in whatever form is fastest ──────────────────────────────────

    def matrix(self, parts: Sequence[Tensor]) -> Handle:
        """Rows of all parts stacked: `[sum of rows, columns]`, for `project` or `add_project`.

        Raises:
            UnsupportedModel: a format that this backend cannot read.
            OutOfDeviceMemory: it does not fit.
        """
        ...

    def gated_matrix(self, gate: Tensor, up: Tensor) -> Handle:
        """Two matrices of one shape, for `project_gated`."""
        ...

    def table(self, tensor: Tensor) -> Handle:
        """`[rows, columns]`, for `embed`."""
        ...

    def tied_table(self, tensor: Tensor) -> tuple[Handle, Handle]:
        """An embedding that is the output matrix as well: for `embed` and for `logits`.

        The two share memory where their forms allow it.
        """
        ...

    def vector(self, tensor: Tensor) -> Handle:
        """A small float32 tensor of any shape: norms, gates' constants, convolution taps."""
        ...

    def router(self, parts: Sequence[Tensor]) -> Handle:
        """Rows that score experts, stacked; float32, since rounding would change choices."""
        ...

    def experts(self, tensor: Tensor) -> Handle:
        """`[experts, rows, columns]`: a matrix for each expert."""
        ...

    def gated_experts(self, parts: Sequence[Tensor]) -> Handle:
        """A gated matrix for each expert: gate and up `[experts, rows, columns]`, or one tensor
        that has both stacked within each expert."""
        ...

    # ── memory: slots for recurrent states, pages for keys and values ─────────────────────────

    def allocate(self, shape: ModelShape, num_slots: int, num_pages: int) -> None:
        """Reserve all state and KV memory, once. A page is PAGE_TOKENS tokens of all layers.

        Raises:
            OutOfDeviceMemory: names what was asked and what would fit.
        """
        ...

    def fit(self, wanted_pages: int) -> Room:
        """How many of the pages fit beside the weights, which are loaded already, and what else."""
        ...

    @property
    def snapshot_sizes(self) -> tuple[int, int]:
        """Bytes of a state and of a page, as they are read and written; after `allocate`."""
        ...

    def host_buffer(self, num_bytes: int) -> memoryview:
        """Host memory that snapshots are written from fastest, content undefined.

        Any thread; at once. It is the caller's until the last view of it goes.
        """
        ...

    @property
    def host_buffers(self) -> HostBuffers | None:
        """How many there are of `host_buffer`, at this moment; None where none is pinned. Any
        thread."""
        ...

    def clear_slot(self, slot: int) -> None:
        """The state before the first token."""
        ...

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a recurrent state."""
        ...

    def begin_read(self, slot: int, pages: Sequence[int]) -> Future[Contents]:
        """Read a recurrent state, and keys and values of pages, all layers of each.

        Returns at once, whatever the size; in order with all other work, so slot and pages may be
        used again. Resolves on any thread, the caller's own included; the buffers are the caller's.
        """
        ...

    def begin_write(self, slot: int, state: HostBytes, pages: Mapping[int, HostBytes]) -> Writing:
        """The inverse of `begin_read`; `pages` by page. Returns at once.

        In order with all work before it. The buffers must not change until it has arrived.
        """
        ...

    # ── one step ──────────────────────────────────────────────────────────────────────────────

    def evaluate(self, batch: Batch, forward: Callable[[Run], Array]) -> Array:
        """Make a batch ready and call `forward`, which calls the operations below; its result.

        A backend may record the operations of a kind of batch once and replay them from then on:
        `forward` must do the same for every batch of that kind and number of spans.
        """
        ...

    def embed(self, run: Run, table: Handle) -> Array:
        """Rows of the table for the batch's tokens: `[tokens, hidden]`."""
        ...

    def rms_norm(self, x: Array, weight: Handle) -> Array:
        """x / sqrt(mean(x²) + eps) * weight, over the last axis."""
        ...

    def project(self, matrix: Handle, x: Array) -> Array:
        """x Wᵀ: `[tokens, columns]` to `[tokens, rows]`."""
        ...

    def add_project(self, matrix: Handle, x: Array, residual: Array) -> Array:
        """residual + x Wᵀ. The residual must not be used again."""
        ...

    def delta_net(self, run: Run, layer: int, weights: DeltaNetWeights, x: Array) -> Array:
        """Gated delta rule from projections `[tokens, qkv | z | beta | alpha]`.

        Convolution, SiLU, norms, gates, recurrence and gated norm of the `layer`-th delta-net
        layer; gives `[tokens, v_heads * v_dim]`. Advances the spans' slots, fills their captures.
        """
        ...

    def attention(self, run: Run, layer: int, weights: AttentionWeights, x: Array) -> Array:
        """Gated attention from projections `[tokens, (query | gate) per head | key | value]`.

        Norms, rotation, append to the pages, causal attention and output gate of the `layer`-th
        attention layer; gives `[tokens, heads * head_dim]`.
        """
        ...

    def project_gated(self, matrix: Handle, x: Array) -> Array:
        """SiLU(x Gᵀ) * (x Uᵀ) for a gated matrix: `[tokens, columns]` to `[tokens, rows of G]`."""
        ...

    def mix_experts(self, weights: ExpertWeights, residual: Array) -> Array:
        """residual + routed experts + shared expert, all from the norm of `residual`, which must
        not be used again. The choice of experts is made in float32."""
        ...

    def logits(
        self, run: Run, norm: Handle, head: Handle, x: Array, rows: Literal["last", "all"]
    ) -> Array:
        """head RMSNorm(x): `[rows, vocab]`, of the last token of each span that samples, or of
        every token."""
        ...

    def logits_to_host(self, logits: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Copy out, float32; waits."""
        ...

    def sample(self, logits: Array, rows: Sequence[SamplingRow], num_tokens: int) -> list[Sampled]:
        """Choose a token for each row, out of the ids below `num_tokens`; waits.

        The stages and their order are those of `engine/sampler.py`.
        """
        ...
