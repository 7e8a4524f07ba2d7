"""Logits of a whole text at once, to check an engine against another. No sampling, no sessions."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.batch import Batch, Span, TokenIds
from daemon.engine.model.model import Model
from daemon.errors import InvalidRequest

PREFILL_TOKENS = 16 * PAGE_TOKENS


def evaluate(model: Model, tokens: TokenIds) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits `[tokens, vocab]` float32 of a prompt, evaluated as the engine would.

    Allocates the backend's memory for this one text.

    Raises:
        InvalidRequest: `tokens` is not a non-empty vector of token ids of this model.
    """
    _check(model, tokens)
    num_pages = -(-len(tokens) // PAGE_TOKENS)
    model.backend.allocate(model.shape, num_slots=1, num_pages=num_pages)
    model.backend.clear_slot(0)
    logits = [
        model.backend.logits_to_host(model.logits(Batch("prefill", (span,)), rows="all"))
        for span in _spans(tokens.astype(np.int32), tuple(range(num_pages)))
    ]
    return np.concatenate(logits)


def _spans(tokens: TokenIds, pages: tuple[int, ...]) -> Iterator[Span]:
    for start in range(0, len(tokens), PREFILL_TOKENS):
        yield Span(tokens[start : start + PREFILL_TOKENS], start, slot=0, pages=pages)


def _check(model: Model, tokens: TokenIds) -> None:
    if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
        raise InvalidRequest(
            f"token ids must be a non-empty vector of integers, not {tokens.dtype} {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= model.shape.vocab_size:
        raise InvalidRequest(f"token ids must be in [0, {model.shape.vocab_size})")
