"""One step's work as host data: which tokens of which sequences, and where their state lives.

Owns nothing on the device. Made by the engine, read by the model and the backend in one step.
"""

from typing import Any, Literal

import numpy as np
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS

TokenIds = np.ndarray[Any, np.dtype[np.int32]]


class Capture(Struct, frozen=True):
    """Copy the recurrent state as it is at `position` (a multiple of PAGE_TOKENS) into `slot`."""

    position: int
    slot: int


class Span(Struct, frozen=True):
    """Consecutive tokens of one sequence.

    `pages` is the sequence's page table, enough for position `start + len(tokens)`, and at most one
    page more than the longest sequence fills. A prefill span starts on the grid, at a multiple of
    PAGE_TOKENS; a decode span has one token. `samples`: the logits of the last token are wanted.
    """

    tokens: TokenIds
    start: int
    slot: int
    pages: tuple[int, ...]
    captures: tuple[Capture, ...] = ()
    samples: bool = False

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def num_chunks(self) -> int:
        """Chunks of the grid that the span touches."""
        return -(-len(self.tokens) // PAGE_TOKENS)


class Batch(Struct, frozen=True):
    """Spans that are evaluated together, all of one kind.

    No slot occurs twice. A page before a span's start may be another's too: nobody writes it.
    """

    kind: Literal["prefill", "decode"]
    spans: tuple[Span, ...]
