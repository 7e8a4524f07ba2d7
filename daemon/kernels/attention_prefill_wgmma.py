"""Describes `attention_prefill_wgmma.cu`, Hopper's prefill kernel, for `attention_prefill.py`."""

from pathlib import Path

from daemon.kernels.attention_tiles import TILE_BYTES, PrefillVariant, variant_defines
from daemon.kernels.kv_format import KvLayout
from daemon.kernels.runtime.device_array import ElementType

SOURCE = Path(__file__).with_suffix(".cu")
HEADS = 2
STAGES = 2
WARPGROUP_THREADS = 128
ALIGNMENT = 1024


def fits(arch: str, group: int) -> bool:
    """Whether the card has these instructions, and the model an even number of heads a group."""
    return arch == "sm_90a" and group % HEADS == 0


def variant(
    layout: KvLayout, group: int, projection: ElementType, output: ElementType
) -> PrefillVariant:
    """Two consumer warpgroups, a head each, and a producer each for keys and values."""
    return PrefillVariant(
        SOURCE,
        variant_defines(layout, group, projection, output),
        HEADS,
        (2 + HEADS) * WARPGROUP_THREADS,
        (HEADS + 2 * STAGES) * TILE_BYTES + ALIGNMENT,
    )
