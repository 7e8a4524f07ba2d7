"""Launches `sample.cu`: chooses the next token of each row of logits on the device.

Owns the parameter block that goes up and the results that come back, one copy each. The stages
and their order are those of engine/sampler.py.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.kernel import Module

SOURCE = Path(__file__).with_suffix(".cu")
PARAMETERS = ("pointer",) * 7 + ("int32",) * 4
THREADS = 1024
BINS = 1024
LOCAL_BIN_BYTES = 12
MAX_BLOCKS = 16
MAX_ALTERNATIVES = 32

ROW = np.dtype(
    [
        ("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("min_p", "f4"),
        ("repetition", "f4"), ("presence", "f4"), ("frequency", "f4"), ("num_alternatives", "i4"),
        ("seed", "u8"), ("step", "u8"),
        ("first_penalty", "i4"), ("num_penalties", "i4"),
        ("first_bias", "i4"), ("num_biases", "i4"),
        ("mask", "i4"), ("unused", "i4"),
    ]
)  # fmt: skip
RESULT = np.dtype(
    [
        ("token", "i4"), ("logprob", "f4"),
        ("ids", "i4", MAX_ALTERNATIVES), ("logprobs", "f4", MAX_ALTERNATIVES),
    ]
)  # fmt: skip


class Choice(NamedTuple):
    """How to choose one row's token; neutral values switch a stage off.

    `counts` maps tokens of prompt and reply to their occurrences in the reply. `num_alternatives`
    None asks for no log-probabilities. `mask` has a bit a token, None allows every one.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition: float
    presence: float
    frequency: float
    seed: int
    step: int
    counts: dict[int, int]
    biases: dict[int, float]
    num_alternatives: int | None
    mask: np.ndarray[Any, np.dtype[np.uint32]] | None = None


class Chosen(NamedTuple):
    """A token, its natural log-probability and the best alternatives, under the raw logits."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


def blocks_for(num_sms: int) -> int:
    """Blocks of a row; all rows of one launch must be on the card at the same time."""
    return min(MAX_BLOCKS, num_sms)


def scratch_bytes(blocks: int) -> int:
    """Size of the kernel's Scratch."""
    return 8 + 24 + blocks * 8 + blocks * 4 + blocks * 8 + MAX_ALTERNATIVES * 8 + 3 * BINS * 16


def defines(vocab_size: int, blocks: int) -> dict[str, str | int]:
    """Macros for rows of `vocab_size` logits."""
    assert blocks % 2 == 0
    return {
        "BLOCKS": blocks,
        "SLICE": -(-vocab_size // blocks),
        "MAX_ALTERNATIVES": MAX_ALTERNATIVES,
    }


def pack(choices: Sequence[Choice]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows, then penalties, then biases, as the kernel reads them."""
    rows = np.zeros(len(choices), ROW)
    first_penalties = list(accumulate((len(c.counts) for c in choices), initial=0))
    first_biases = list(accumulate((len(c.biases) for c in choices), initial=0))
    num_masks = list(accumulate((c.mask is not None for c in choices), initial=0))
    for i, c in enumerate(choices):
        alternatives = -1 if c.num_alternatives is None else c.num_alternatives
        assert alternatives <= MAX_ALTERNATIVES
        rows[i] = (
            c.temperature, c.top_k, c.top_p, c.min_p,
            c.repetition, c.presence, c.frequency, alternatives,
            c.seed % 2**64, c.step,
            first_penalties[i], len(c.counts), first_biases[i], len(c.biases),
            -1 if c.mask is None else num_masks[i], 0,
        )  # fmt: skip
    penalties = np.array([pair for c in choices for pair in c.counts.items()], np.int32)
    tokens = np.array([token for c in choices for token in c.biases], np.int32)
    amounts = np.array([amount for c in choices for amount in c.biases.values()], np.float32)
    biases = np.stack([tokens, amounts.view(np.int32)], axis=-1)
    parts = [rows.view(np.uint8), *(p.reshape(-1).view(np.uint8) for p in (penalties, biases))]
    return np.concatenate(parts)


class Sample:
    """The kernel for rows of `vocab_size` logits, with memory for `max_rows`."""

    def __init__(self, device: Device, compiler: Compiler, vocab_size: int, max_rows: int) -> None:
        self._device = device
        self._blocks = blocks_for(device.num_sms) // 2 * 2
        self._shared_bytes = BINS * LOCAL_BIN_BYTES + -(-vocab_size // self._blocks) * 4
        cubin = compiler.cubin(SOURCE, defines(vocab_size, self._blocks))
        self._kernel = Module(cubin).kernel("sample", PARAMETERS, self._shared_bytes)
        self._scratch = device.allocate((max_rows, scratch_bytes(self._blocks)), ElementType.U8)
        self._results = device.allocate((max_rows, RESULT.itemsize), ElementType.U8)
        self._parameters = device.allocate((max_rows * ROW.itemsize,), ElementType.U8)
        self._mask_words = -(-vocab_size // 32)
        self._masks = device.allocate((max_rows, self._mask_words), ElementType.U32)
        pinned = device.allocate_pinned(self._masks.num_bytes)
        self._host_masks = pinned.view(np.uint32).reshape(self._masks.shape)

    def __call__(
        self, logits: DeviceArray, choices: Sequence[Choice], num_tokens: int
    ) -> list[Chosen]:
        """Choose a token below `num_tokens` for each row of float32 logits; waits."""
        self.launch(logits, choices, num_tokens)
        count = len(choices)
        results = self._device.to_host(self._results.rows(0, count)).reshape(-1).view(RESULT)
        return [_chosen(result, c) for result, c in zip(results, choices, strict=True)]

    def launch(self, logits: DeviceArray, choices: Sequence[Choice], num_tokens: int) -> None:
        """Start choosing; results stay on the device. With masks, wait before the next launch."""
        count = len(choices)
        self._upload([c.mask for c in choices if c.mask is not None])
        packed = pack(choices)
        if packed.nbytes > self._parameters.num_bytes:
            self._device.synchronize()
            self._parameters = self._device.allocate((2 * packed.nbytes,), ElementType.U8)
        self._device.write(self._parameters.view((packed.nbytes,)), packed)
        self._device.fill(self._scratch.rows(0, count), 0)
        penalties = self._parameters.pointer + count * ROW.itemsize
        biases = penalties + 8 * sum(len(c.counts) for c in choices)
        at_once = max(1, self._device.num_sms // self._blocks)
        for first in range(0, count, at_once):
            self._kernel.launch(
                self._device.stream,
                (self._blocks, min(at_once, count - first), 1),
                (THREADS, 1, 1),
                logits,
                self._parameters,
                penalties,
                biases,
                self._masks,
                self._scratch,
                self._results,
                first,
                logits.shape[1],
                self._mask_words,
                num_tokens,
                shared_bytes=self._shared_bytes,
            )

    def _upload(self, masks: Sequence[np.ndarray[Any, np.dtype[np.uint32]]]) -> None:
        """Copy the masks of this launch through pinned memory, which the copy reads later.

        A vocabulary may have fewer tokens than there are logits: the others are not allowed.
        """
        if not masks:
            return
        packed = self._host_masks[: len(masks)]
        for row, mask in zip(packed, masks, strict=True):
            size = min(len(mask), len(row))
            row[:size] = mask[:size]
            row[size:] = 0
        self._device.write(self._masks.rows(0, len(masks)), packed)


def _chosen(result: Any, choice: Choice) -> Chosen:
    count = choice.num_alternatives or 0
    pairs = zip(result["ids"][:count], result["logprobs"][:count], strict=True)
    alternatives = tuple((int(token), float(logprob)) for token, logprob in pairs)
    return Chosen(int(result["token"]), float(result["logprob"]), alternatives)
