"""Launches `moe_gate_up.cu` and `moe_down.cu`: experts of up to 16 rows, each weight read once.

Owns how a card's warps share the work, which depends on the matrices and the card alone, so that
sums keep their order. The device's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from daemon.kernels.moe_pack import (
    ExpertMatrix,
    GatedExperts,
    GateUpStep,
    gate_up_steps,
    kinds_of,
)
from daemon.kernels.moe_route import MoeSizes, RouteLists
from daemon.kernels.quant_gemv import MAX_TOKENS, PANEL_TOKENS
from daemon.kernels.quant_pack import BLOCK_COLUMNS, types_and_tile
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Kernel, Module
from daemon.kernels.weight_ring import STATIC_SHARED_BYTES, most_warps, ring_defines

GATE_UP_SOURCE = Path(__file__).with_name("moe_gate_up.cu")
DOWN_SOURCE = Path(__file__).with_name("moe_down.cu")
GATE_UP_PARAMETERS = ("pointer",) * 6 + ("int32",) * 11
DOWN_PARAMETERS = ("pointer",) * 7 + ("int32",) * 10
ITEM_ROWS = 16
"""Of the output, that a block of moe_down makes at a time."""
SUM_STRIDE = 20
"""Floats that a token's 16 sums take in moe_gate_up's shared memory."""

MAX_SLOTS = 4
"""Tiles that a warp has asked for: more do not come sooner."""


class Team(NamedTuple):
    """Warps that make an item of moe_gate_up together, teams of a block, blocks of k a warp."""

    warps: int
    teams: int
    turns: int

    @property
    def num_warps(self) -> int:
        """Of a block."""
        return self.warps * self.teams


def choose_team(num_blocks: int, warps: int) -> Team:
    """A warp for each block of k, as far as `warps` reach; as many teams as they make."""
    turns = -(-num_blocks // warps)
    own = -(-num_blocks // turns)
    return Team(own, warps // own, turns)


class MoeDecode:
    """Kernels for one model's experts; compiled when first used.

    Args:
        max_width: the most rows of a down matrix's input, of the routed and the shared experts.
    """

    def __init__(self, device: Device, compiler: Compiler, sizes: MoeSizes, max_width: int) -> None:
        self._device = device
        self._compiler = compiler
        self._sizes = sizes
        self._warps = most_warps(device.shared_bytes_per_block)
        self._hidden_blocks = -(-max_width // BLOCK_COLUMNS)
        slots = sizes.max_slots
        hidden = (slots, MAX_TOKENS, self._hidden_blocks * BLOCK_COLUMNS)
        self._hidden = device.allocate(hidden, ElementType.F16)
        self._up = device.allocate((slots, MAX_TOKENS, max_width), np.float32)
        self._up_stride = max_width
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def gate_up(
        self,
        routed: GatedExperts,
        shared: GatedExperts | None,
        panels: DeviceArray,
        lists: RouteLists,
        num_rows: int,
    ) -> None:
        """SwiGLU of every listed expert, kept for `down`.

        Args:
            panels: fp16 panels of the normed rows (MoeRoute.few).
        """
        for step in gate_up_steps(routed, shared):
            self._gate_up_step(step, panels, lists, num_rows)

    def _gate_up_step(
        self, step: GateUpStep, panels: DeviceArray, lists: RouteLists, num_rows: int
    ) -> None:
        num_panels = -(-num_rows // PANEL_TOKENS)
        blocks = self._sizes.columns // BLOCK_COLUMNS
        types, slot_bytes = types_and_tile(kinds_of(step.routed, step.shared))
        team = self._team(blocks, slot_bytes)
        room = gate_up_room(team, num_panels, self._sizes)
        slots = self._slots(slot_bytes, team.num_warps, room)
        kernel = self._gate_up_kernel(types, num_panels, slots, slot_bytes, team, step.epilogue)
        kernel.launch(
            self._device.stream,
            (self._device.num_sms, 1, 1),
            (32 * team.num_warps, 1, 1),
            *(_tiles(step.routed), _tiles(step.shared), lists.experts, panels),
            *(self._hidden, self._up, *_form(step.routed), *_form(step.shared)),
            *(blocks, self._hidden_blocks, self._up_stride, self._list_length(num_rows), num_rows),
            shared_bytes=slots * slot_bytes * team.num_warps + room,
            dependent=True,
        )

    def down(
        self,
        routed: ExpertMatrix,
        shared: ExpertMatrix | None,
        lists: RouteLists,
        residual: DeviceArray,
    ) -> None:
        """Add the weighted sum of all that `gate_up` made to `residual`, f32 `[rows, columns]`."""
        num_rows, columns = residual.shape
        num_panels = -(-num_rows // PANEL_TOKENS)
        blocks = max(routed.blocks, shared.blocks if shared else 0)
        types, slot_bytes = types_and_tile(kinds_of(routed, shared))
        room = down_room(num_panels, blocks, self._sizes)
        warps = self._warps if self._slots(slot_bytes, self._warps, room) > 0 else self._warps // 2
        slots = self._slots(slot_bytes, warps, room)
        kernel = self._down_kernel(types, num_panels, slots, slot_bytes, blocks, warps)
        items = columns // ITEM_ROWS
        shared_form = (shared.kind.code, shared.kind.tile_bytes, shared.blocks) if shared else (
            0, 0, 0,
        )  # fmt: skip
        kernel.launch(
            self._device.stream,
            (min(items, self._device.num_sms), 1, 1),
            (32 * warps, 1, 1),
            *(routed.tiles, _tiles(shared), *lists, self._hidden, residual),
            *(routed.kind.code, routed.kind.tile_bytes, routed.blocks, *shared_form),
            *(items, self._hidden_blocks, self._list_length(num_rows), num_rows),
            shared_bytes=slots * slot_bytes * warps + room,
            dependent=True,
        )

    def _list_length(self, num_rows: int) -> int:
        """Entries that `num_rows` rows can fill."""
        return 1 + num_rows * self._sizes.num_used

    def _team(self, num_blocks: int, slot_bytes: int) -> Team:
        """The same for any number of rows, since it decides the order of sums."""
        most = choose_team(num_blocks, self._warps)
        room = gate_up_room(most, MAX_TOKENS // PANEL_TOKENS, self._sizes)
        fits = self._slots(slot_bytes, most.num_warps, room) > 0
        return most if fits else choose_team(num_blocks, self._warps // 2)

    def _slots(self, slot_bytes: int, warps: int, room: int) -> int:
        """Tiles of a warp's ring; 0 if `warps` are too many."""
        limit = self._device.shared_bytes_per_block - STATIC_SHARED_BYTES - room
        return min(MAX_SLOTS, limit // (warps * slot_bytes))

    def _gate_up_kernel(
        self, types: int, num_panels: int, slots: int, slot_bytes: int, team: Team, epilogue: int
    ) -> Kernel:
        key = (types, num_panels, slots, slot_bytes, *team, epilogue)
        if key not in self._kernels:
            macros = gate_up_defines(*key[:4], team, epilogue, self._compiler.arch)
            self._kernels[key] = self._compiled(GATE_UP_SOURCE, macros, GATE_UP_PARAMETERS)
        return self._kernels[key]

    def _down_kernel(
        self, types: int, num_panels: int, slots: int, slot_bytes: int, blocks: int, warps: int
    ) -> Kernel:
        key = (types, num_panels, slots, slot_bytes, blocks, warps)
        if key not in self._kernels:
            macros = down_defines(*key, self._sizes.num_used, self._compiler.arch)
            self._kernels[key] = self._compiled(DOWN_SOURCE, macros, DOWN_PARAMETERS)
        return self._kernels[key]

    def _compiled(
        self, source: Path, macros: dict[str, int], parameters: tuple[str, ...]
    ) -> Kernel:
        most = self._device.shared_bytes_per_block - STATIC_SHARED_BYTES
        return Module(self._compiler.cubin(source, macros)).kernel(source.stem, parameters, most)


def _tiles(matrix: ExpertMatrix | None) -> DeviceArray | int:
    return matrix.tiles if matrix is not None else 0


def _form(matrix: ExpertMatrix | None) -> tuple[int, int, int]:
    """Type, bytes of a tile, tiles of an expert's rows."""
    if matrix is None:
        return (0, 0, 0)
    return (matrix.kind.code, matrix.kind.tile_bytes, 4 * matrix.stripes)


def gate_up_room(team: Team, num_panels: int, sizes: MoeSizes) -> int:
    """Shared memory of moe_gate_up besides its rings: sums of two items a team, and the list."""
    sums = 2 * team.teams * team.warps * num_panels * PANEL_TOKENS * SUM_STRIDE
    return 4 * (sums + sizes.max_slots)


def down_room(num_panels: int, blocks: int, sizes: MoeSizes) -> int:
    """Shared memory of moe_down besides its rings: every row's parts, and the lists."""
    parts = num_panels * PANEL_TOKENS * (sizes.num_used + 1) * blocks * ITEM_ROWS
    return 4 * parts + sizes.max_slots * (MAX_TOKENS + 4)


def gate_up_defines(
    types: int, num_panels: int, slots: int, slot_bytes: int, team: Team, epilogue: int, arch: str
) -> dict[str, int]:
    """The macros of a variant of moe_gate_up."""
    return {
        "TYPES": types,
        "NUM_PANELS": num_panels,
        "TEAM": team.warps,
        "TEAMS": team.teams,
        "TURNS": team.turns,
        "EPILOGUE": epilogue,
        **ring_defines(slots, slot_bytes, arch),
    }


def down_defines(
    types: int,
    num_panels: int,
    slots: int,
    slot_bytes: int,
    blocks: int,
    warps: int,
    used: int,
    arch: str,
) -> dict[str, int]:
    """The macros of a variant of moe_down."""
    return {
        "TYPES": types,
        "NUM_PANELS": num_panels,
        "BLOCKS": blocks,
        "WARPS": warps,
        "USED": used,
        **ring_defines(slots, slot_bytes, arch),
    }
