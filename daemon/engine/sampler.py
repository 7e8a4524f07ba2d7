"""How the next token is chosen: one function a stage, in one fixed order.

penalties → logit_bias → mask → temperature → top-k → top-p → min-p → draw. Host code over one row
of logits; a device sampler does the same in the same order. Pure: seed and step fix the draw.
"""

from typing import Any

import numpy as np

from daemon.engine.backends.backend import Sampled, SamplingRow
from daemon.engine.constraint import Mask
from daemon.engine.requests import SamplingParams, TokenLogprobs
from daemon.errors import DeviceError

Logits = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
MASK64 = (1 << 64) - 1
COLDEST = 1e-6
"""Temperatures below it divide to infinity; there is no difference left to draw from."""


def sample(logits: Logits, row: SamplingRow) -> Sampled:
    """Choose one token from logits `[tokens]`. Greedy at temperature 0: the lowest best id.

    Raises:
        DeviceError: the best logit is not a finite number, so the model's arithmetic has failed.
    """
    if not np.isfinite(logits.max()):
        raise DeviceError("the model's logits are not finite; the weights or the device are faulty")
    params = row.params
    adjusted = masked(bias(penalize(logits, row), params), row.mask)
    if params.temperature == 0:
        token = int(adjusted.argmax())
    else:
        ids, shares = candidates(adjusted, params)
        token = int(ids[draw(shares, uniform(row.seed, row.step))])
    return Sampled(token, report(logits, token, params.logprobs))


def penalize(logits: Logits, row: SamplingRow) -> Logits:
    """Repetition penalty over prompt and reply; presence and frequency over the reply alone.

    Repetition divides a positive logit and multiplies a negative one (arXiv 1909.05858); the other
    two subtract, as OpenAI defines them.
    """
    params = row.params
    if not row.counts:
        return logits
    ids = np.fromiter(row.counts, np.int64, len(row.counts))
    replies = np.fromiter((reply for _, reply in row.counts.values()), np.float32, len(ids))
    adjusted = logits.copy()
    seen = adjusted[ids]
    factor = np.float32(params.repetition_penalty)
    seen = np.where(seen > 0, seen / factor, seen * factor)
    seen -= np.float32(params.presence_penalty) * (replies > 0)
    seen -= np.float32(params.frequency_penalty) * replies
    adjusted[ids] = seen
    return adjusted


def bias(logits: Logits, params: SamplingParams) -> Logits:
    """Add `logit_bias`; ids beyond the row are ignored."""
    if not params.logit_bias:
        return logits
    adjusted = logits.copy()
    for token, amount in params.logit_bias:
        if 0 <= token < len(adjusted):
            adjusted[token] += np.float32(amount)
    return adjusted


def masked(logits: Logits, mask: Mask | None) -> Logits:
    """Minus infinity for every token that the mask does not allow."""
    if mask is None:
        return logits
    allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    return np.where(allowed, logits, np.float32(-np.inf))


def candidates(logits: Logits, params: SamplingParams) -> tuple[Ids, np.ndarray[Any, Any]]:
    """Token ids that stay, best first (ties: lower id), and their shares, which sum to one."""
    ids = _best_first(logits, params.top_k)
    best = logits[ids].astype(np.float64)
    shares = np.exp((best - best[0]) / max(params.temperature, COLDEST))
    shares /= shares.sum()
    keep = best > -np.inf
    if params.top_p < 1:
        # A token stays while those before it have not reached top_p; the best always stays.
        keep &= np.cumsum(shares) - shares < max(params.top_p, np.finfo(np.float64).tiny)
    if params.min_p > 0:
        keep &= shares >= params.min_p * shares[0]
    kept = shares[keep]
    return ids[keep], kept / kept.sum()


def _best_first(scores: np.ndarray[Any, Any], top_k: int) -> Ids:
    if 0 < top_k < len(scores):
        threshold = np.partition(scores, -top_k)[-top_k]
        ids = np.flatnonzero(scores >= threshold)
    else:
        ids = np.arange(len(scores))
        top_k = len(scores)
    return ids[np.argsort(-scores[ids], kind="stable")][:top_k]


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) from seed and step alone (SplitMix64), so that a retry draws the same."""
    value = (seed + (step + 1) * 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return float((value ^ (value >> 31)) >> 11) * 2.0**-53


def draw(shares: np.ndarray[Any, Any], number: float) -> int:
    """Index at which the running sum of shares passes `number`."""
    index = int(np.searchsorted(np.cumsum(shares), number, side="right"))
    return min(index, len(shares) - 1)


def report(logits: Logits, token: int, num_alternatives: int | None) -> TokenLogprobs | None:
    """Log-probabilities under the model's own distribution, before any stage."""
    if num_alternatives is None:
        return None
    wide = logits.astype(np.float64)
    top = wide.max()
    logprobs = wide - (top + np.log(np.exp(wide - top).sum()))
    best = _best_first(wide, num_alternatives)[:num_alternatives]
    alternatives = tuple((int(i), float(logprobs[i])) for i in best)
    return TokenLogprobs(float(logprobs[token]), alternatives)
