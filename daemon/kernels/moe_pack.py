"""Expert tensors on the device: `[experts, rows, columns]` as one packed matrix after the other.

Owns which matrices a launch of the expert kernels takes. The device's thread.
"""

from __future__ import annotations

from typing import NamedTuple

from daemon.errors import UnsupportedModel
from daemon.kernels.quant_gemv import STORE, SWIGLU
from daemon.kernels.quant_pack import (
    BLOCK_COLUMNS,
    STRIPE_ROWS,
    PackedMatrix,
    Packer,
    QuantType,
    RawMatrix,
    can_pair,
)
from daemon.kernels.runtime.device_array import DeviceArray

GATE = 3
"""Epilogue: SiLU of the sums, times what an earlier STORE left. See moe_gate_up.cu, moe_gemm.cu."""


class RawExperts(NamedTuple):
    """`matrix` has the rows of all experts in order, `num_experts` of them."""

    num_experts: int
    matrix: RawMatrix

    @property
    def rows(self) -> int:
        """Of one expert."""
        return self.matrix.rows // self.num_experts


class ExpertMatrix(NamedTuple):
    """One packed format: `tiles` u8 `[experts * stripes, columns / 256, 4, tile bytes]`."""

    kind: QuantType
    tiles: DeviceArray
    num_experts: int
    rows: int
    columns: int

    @property
    def stripes(self) -> int:
        """Groups of four tiles of one expert."""
        return self.rows // self.kind.stripe_rows

    @property
    def blocks(self) -> int:
        """Groups of 256 columns."""
        return self.columns // BLOCK_COLUMNS


class GatedExperts(NamedTuple):
    """Gate and up: `parts` is one matrix with paired rows, or gate and up apart.

    `width` is what comes out, for each row and expert.
    """

    parts: tuple[ExpertMatrix, ...]
    width: int

    @property
    def is_paired(self) -> bool:
        """Whether rows of gate and up alternate in groups of 8."""
        return len(self.parts) == 1


def pack_experts(packer: Packer, raw: RawExperts) -> ExpertMatrix:
    """Every expert's rows as they are.

    Raises:
        UnsupportedModel: rows that do not fill stripes, or what `Packer.pack` refuses.
    """
    if raw.rows % STRIPE_ROWS:
        raise UnsupportedModel(f"An expert has {raw.rows} rows, no multiple of {STRIPE_ROWS}.")
    segment = packer.pack([raw.matrix]).segments[0]
    columns = raw.matrix.columns
    return ExpertMatrix(segment.kind, segment.tiles, raw.num_experts, raw.rows, columns)


def pack_gated(packer: Packer, gate: RawExperts, up: RawExperts) -> GatedExperts:
    """Gate and up, paired where their formats are equal.

    Raises:
        UnsupportedModel: see `pack_experts`.
    """
    if not can_pair(gate.matrix, up.matrix) or gate.rows % (STRIPE_ROWS // 2):
        apart = (pack_experts(packer, gate), pack_experts(packer, up))
        return GatedExperts(apart, gate.rows)
    return _paired(packer.pack_paired(gate.matrix, up.matrix), gate.num_experts)


def pack_stacked(packer: Packer, raw: RawExperts) -> GatedExperts:
    """Gate and up in one tensor: within each expert the rows of gate, then those of up.

    Raises:
        UnsupportedModel: see `pack_experts`.
    """
    width = raw.rows // 2
    if width % (STRIPE_ROWS // 2):
        raise UnsupportedModel(f"An expert is {width} wide, no multiple of {STRIPE_ROWS // 2}.")
    halves = [
        raw.matrix.rows_between(start, start + width) for start in range(0, raw.matrix.rows, width)
    ]
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    if can_pair(*pairs[0]):
        return _paired(packer.pack_pairs(pairs), raw.num_experts)
    gate, up = (packer.pack_stack(half).segments[0] for half in (halves[::2], halves[1::2]))
    apart = (
        ExpertMatrix(kind, tiles, raw.num_experts, width, raw.matrix.columns)
        for kind, _, _, tiles in (gate, up)
    )
    return GatedExperts(tuple(apart), width)


def _paired(packed: PackedMatrix, num_experts: int) -> GatedExperts:
    kind, _, all_rows, tiles = packed.segments[0]
    rows = all_rows // num_experts
    return GatedExperts((ExpertMatrix(kind, tiles, num_experts, rows, packed.columns),), rows // 2)


class GateUpStep(NamedTuple):
    """One launch: its epilogue, and what it multiplies by; a missing matrix has no rows in it."""

    epilogue: int
    routed: ExpertMatrix | None
    shared: ExpertMatrix | None


def gate_up_steps(routed: GatedExperts, shared: GatedExperts | None) -> list[GateUpStep]:
    """One launch where gate and up are paired; up before gate where they lie apart."""

    def part(experts: GatedExperts | None, is_paired: bool, index: int) -> ExpertMatrix | None:
        here = experts is not None and experts.is_paired == is_paired
        return experts.parts[index] if experts is not None and here else None

    def step(epilogue: int, is_paired: bool, index: int) -> GateUpStep:
        return GateUpStep(epilogue, part(routed, is_paired, index), part(shared, is_paired, index))

    pairing = {experts.is_paired for experts in (routed, shared) if experts is not None}
    steps = [step(SWIGLU, True, 0)] if True in pairing else []
    return steps + ([step(STORE, False, 1), step(GATE, False, 0)] if False in pairing else [])


def kinds_of(*matrices: ExpertMatrix | None) -> set[QuantType]:
    """The types of those matrices that there are."""
    return {matrix.kind for matrix in matrices if matrix is not None}
