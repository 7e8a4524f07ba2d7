"""What a checkpoint is, for those who make them and those who keep them.

Owns the data that crosses between engine/ and cache/, which do not import each other; imports
nothing of ours. Positions are multiples of PAGE_TOKENS.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

PAGE_TOKENS = 64
"""Tokens of one KV page, of one delta-rule chunk and of one link of the hash chain."""

Reason = Literal[
    "system",  # end of system prompt and tools
    "user",  # start of a user message
    "prompt",  # end of the prompt, before the generation prompt
    "tool",  # start of a tool result near the end of the prompt
    "mark",  # where the client asked for one
    "junction",  # where the prompt leaves an earlier one
    "interval",  # every N tokens of a long prefill
    "interrupted",  # where a prefill was interrupted
    "reply",  # end of a reply
    "section",  # inside a message: a paragraph, a tool's definition
    "head",  # inside the first tokens of a tool result
]
"""Why a checkpoint was taken. Recorded with it."""

Birth = Literal["prompt", "decode"]
"""How a state was born: by prompt evaluation on the 64-token grid, or by decoding."""

Tier = Literal["device", "host", "disk"]
"""Where a checkpoint lies: on the device, in this machine's memory, or in the store's file."""

Departure = Literal[
    "evicted",  # to stay within the budget
    "dropped",  # given up before it was written
    "damaged",  # it was not what had been written
    "wiped",  # somebody asked for it
]
"""Why a checkpoint went."""

HostBytes = bytes | bytearray | memoryview


class Boundary(Struct, frozen=True):
    """A position of the prompt, in tokens from its start, where a checkpoint has meaning."""

    position: int
    reason: Reason


class Found(Struct, frozen=True):
    """A stored checkpoint that is a prefix of a timeline's tokens."""

    position: int
    born: Birth
    reason: Reason
    tier: Tier = "disk"


class Departed(Struct, frozen=True):
    """A checkpoint that was stored once, at `position`."""

    position: int
    cause: Departure


class Reach(Struct, frozen=True):
    """What of a prompt a store has, and what it had: `departed` lies beyond `found`."""

    found: Found | None
    departed: Departed | None = None


class Snapshot(Struct, frozen=True):
    """All that a sequence is at `position`, as bytes that only the engine can read.

    The first `num_grid_pages` of its pages were computed by prompt evaluation on the grid from a
    state so born; the later ones by decoding, or on top of a decoded state. With `born` "prompt"
    all of them are of the first kind. `pages` holds KV page i under key i: a loaded snapshot has
    all of [0, position / PAGE_TOKENS), one to save only those that `missing_pages` named.
    """

    position: int
    born: Birth
    num_grid_pages: int
    state: HostBytes
    pages: Mapping[int, HostBytes]
