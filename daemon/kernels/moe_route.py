"""Launches `moe_route.cu` and `moe_scores.cu`: each row's experts, and lists for the kernels.

The device's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from daemon.kernels.quant_gemv import MAX_TOKENS
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.kernel import Kernel, Module

SOURCE = Path(__file__).with_suffix(".cu")
SCORES_SOURCE = SOURCE.with_name("moe_scores.cu")
ROUTE_PARAMETERS = ("pointer",) * 9 + ("int32", "float32")
CHOOSE_PARAMETERS = ("pointer",) * 3 + ("int32",)
GROUP_PARAMETERS = ("pointer",) * 3 + ("int32",) * 2
SCORES_PARAMETERS = ("pointer",) * 4 + ("int32", "float32")
THREADS = 256
WARPS = THREADS // 32
MAX_EXPERTS, MAX_USED = 1024, 32
SCORE_TILES = (64, 32)


class MoeSizes(NamedTuple):
    """Experts, how many a row uses, columns of a row, and whether there is a shared expert."""

    num_experts: int
    num_used: int
    columns: int
    has_shared: bool

    @property
    def num_scores(self) -> int:
        """Rows of the router: one an expert, and the shared expert's gate."""
        return self.num_experts + int(self.has_shared)

    @property
    def max_slots(self) -> int:
        """Entries of the lists: the shared expert, and each row's own choice."""
        return 1 + MAX_TOKENS * self.num_used


class RouteLists(NamedTuple):
    """What up to 16 rows chose, in device memory.

    `experts` i32 `[slots]`: how many distinct ones, then each; slot 0 is the shared expert.
    `ranks` u8 `[slots, 16]`: a slot's rank for each row, 255 for none; the shared expert's is the
    last. `weights` f32 `[16, used + 1]`.
    """

    experts: DeviceArray
    ranks: DeviceArray
    weights: DeviceArray

    @classmethod
    def allocate(cls, device: Device, sizes: MoeSizes) -> RouteLists:
        """Lists for any choice."""
        slots = sizes.max_slots
        return cls(
            device.allocate((slots,), np.int32),
            device.allocate((slots, MAX_TOKENS), np.uint8),
            device.allocate((MAX_TOKENS, sizes.num_used + 1), np.float32),
        )


class RowLines(NamedTuple):
    """What the rows of a prompt chose, in device memory.

    `chosen` i32 `[rows, used]`; `weights` f32 `[rows, used + 1]`, the shared expert's last; `first`
    i32 `[experts + 2]`: where the lines of each expert begin, of the shared one, and the end;
    `places` i32 `[rows, used]`: each choice's line times 8, plus its number in the expert modulo 8.
    """

    chosen: DeviceArray
    weights: DeviceArray
    first: DeviceArray
    places: DeviceArray

    @classmethod
    def allocate(cls, device: Device, sizes: MoeSizes, rows: int) -> RowLines:
        """Arrays for up to `rows` rows."""
        used = sizes.num_used
        return cls(
            device.allocate((rows, used), np.int32),
            device.allocate((rows, used + 1), np.float32),
            device.allocate((sizes.num_experts + 2,), np.int32),
            device.allocate((rows, used), np.int32),
        )

    def of(self, rows: int) -> RowLines:
        """Views for the first `rows`."""
        return RowLines(
            self.chosen.rows(0, rows), self.weights.rows(0, rows), self.first,
            self.places.rows(0, rows),
        )  # fmt: skip


class MoeRoute:
    """The kernels for one model's experts.

    Args:
        max_rows: of a prompt.
    """

    def __init__(self, device: Device, compiler: Compiler, sizes: MoeSizes, max_rows: int) -> None:
        module = Module(compiler.cubin(SOURCE, defines(sizes)))
        self._route = module.kernel("moe_route", ROUTE_PARAMETERS)
        self._choose = module.kernel("moe_choose", CHOOSE_PARAMETERS)
        self._group = module.kernel("moe_group", GROUP_PARAMETERS)
        self._scores = {tile: _scores_kernel(compiler, sizes, tile) for tile in SCORE_TILES}
        self._device = device
        self._sizes = sizes
        rows = max(max_rows, MAX_TOKENS)
        self._scratch = device.allocate((rows, sizes.num_scores), np.float32)
        self._counter = device.allocate((1,), np.int32)
        device.fill(self._counter, 0)

    def few(
        self,
        x: DeviceArray,
        norm: DeviceArray,
        router: DeviceArray,
        panels: DeviceArray,
        lists: RouteLists,
        eps: float,
    ) -> None:
        """Up to 16 rows: their norm as fp16 panels, and their experts.

        Args:
            x: f32 `[rows, columns]`, before the norm.
            router: f32 `[num_scores, columns]`.
        """
        rows = x.shape[0]
        assert rows <= MAX_TOKENS
        assert router.shape == (self._sizes.num_scores, self._sizes.columns)
        grid = (-(-self._sizes.num_scores // 2), 1, 1)
        self._route.launch(
            self._device.stream, grid, (THREADS, 1, 1),
            x, norm, router, panels, self._scratch, *lists, self._counter, rows, eps,
            dependent=True,
        )  # fmt: skip

    def many(
        self, x: DeviceArray, norm: DeviceArray, router: DeviceArray, lines: RowLines, eps: float
    ) -> None:
        """The rows of a prompt: everything of `lines` but the shared expert's weights."""
        rows = x.shape[0]
        experts = self._sizes.num_experts
        tile = self._score_tile(rows)
        self._launch(
            self._scores[tile], (-(-rows // tile), -(-experts // tile), 1), tile * tile // 16,
            x, norm, router, self._scratch, rows, eps,
        )  # fmt: skip
        self._launch(
            self._choose, (-(-rows // WARPS), 1, 1), THREADS,
            self._scratch, lines.chosen, lines.weights, rows,
        )  # fmt: skip
        self._launch(
            self._group, (experts, 1, 1), THREADS,
            lines.chosen, lines.first, lines.places, rows * self._sizes.num_used, rows,
        )  # fmt: skip

    def _score_tile(self, rows: int) -> int:
        """The larger tile where it fills the card."""
        blocks = -(-rows // 64) * -(-self._sizes.num_experts // 64)
        return 64 if blocks >= self._device.num_sms else 32

    def _launch(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, *arguments: object
    ) -> None:
        kernel.launch(self._device.stream, grid, (threads, 1, 1), *arguments, dependent=True)


def _scores_kernel(compiler: Compiler, sizes: MoeSizes, tile: int) -> Kernel:
    cubin = compiler.cubin(SCORES_SOURCE, score_defines(sizes, tile))
    return Module(cubin).kernel("moe_scores", SCORES_PARAMETERS)


def defines(sizes: MoeSizes) -> dict[str, int]:
    """The macros of moe_route.cu."""
    assert sizes.num_experts <= MAX_EXPERTS
    assert 1 <= sizes.num_used <= min(MAX_USED, sizes.num_experts)
    return {
        "EXPERTS": sizes.num_experts,
        "USED": sizes.num_used,
        "COLUMNS": sizes.columns,
        "SHARED": int(sizes.has_shared),
    }


def score_defines(sizes: MoeSizes, tile: int) -> dict[str, int]:
    """The macros of moe_scores.cu."""
    return {"EXPERTS": sizes.num_experts, "COLUMNS": sizes.columns, "TILE": tile}
