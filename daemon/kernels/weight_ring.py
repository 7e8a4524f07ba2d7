"""What kernels with weight_ring.cuh need of a card: its macros, warps of a block, shared memory.

Refuses to know what the warps multiply: quant_gemv and moe_decode do. Any thread.
"""

ROOMY_SHARED_BYTES = 200 * 1024
"""Cards with as much have four teams of four warps a multiprocessor, others two."""

STATIC_SHARED_BYTES = 3072
"""Barriers, and what the driver keeps of a block."""

WITHOUT_COPY_ENGINE = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
"""Plain sm_90 leaves Hopper's own instructions out: tests run the portable code with it."""


def most_warps(shared_bytes_per_block: int) -> int:
    """Of a block, which has a multiprocessor to itself."""
    return 16 if shared_bytes_per_block >= ROOMY_SHARED_BYTES else 8


def ring_defines(slots: int, slot_bytes: int, arch: str) -> dict[str, int]:
    """The macros of a warp's ring."""
    bulk = int(arch not in WITHOUT_COPY_ENGINE)
    return {"SLOTS": slots, "SLOT_BYTES": slot_bytes, "BULK_COPIES": bulk}
