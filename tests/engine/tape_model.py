"""A model whose state is the list of its tokens: it notices every wrong place and position.

Stands in for Model and Backend. A slot holds the tokens that were fed, a page the tokens of its 64
positions, and the next token is a checksum of all of them. So a reply is right only if every token
was evaluated once, in order, into the right slot and pages, whatever happened in between.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.backend import Contents, Sampled, SamplingRow, Writing
from daemon.engine.batch import Batch, Span
from daemon.engine.constraint import Mask
from daemon.engine.requests import TokenLogprobs

VOCAB = 50_000


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes()) % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def logprobs_of(token: int, num_alternatives: int | None) -> TokenLogprobs | None:
    """Made up from the token."""
    if num_alternatives is None:
        return None
    return TokenLogprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(num_alternatives)))


class TapeModel:
    """`overlaps` as a backend has it; `before_batch` may raise, as a device would; `batches` are
    those that were evaluated; a snapshot comes back after `read_steps` ticks, may be used on the
    device after `write_steps`, and is all there after as many more."""

    def __init__(self, num_slots: int, num_pages: int) -> None:
        self.backend = self
        self.slots: list[list[int] | None] = [None] * num_slots
        self.pages = np.full((num_pages, PAGE_TOKENS), -1, np.int32)
        self.before_batch: Callable[[Batch], None] = lambda batch: None
        self.batches: list[Batch] = []
        self.read_steps = self.write_steps = 0
        self.under_way: list[tuple[int, Callable[[], None]]] = []
        self.overlaps = False

    @property
    def snapshot_sizes(self) -> tuple[int, int]:
        return 4, 4 * PAGE_TOKENS

    def host_buffer(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    # ── Model ─────────────────────────────────────────────────────────────────────────────────

    def logits(self, batch: Batch) -> list[int]:
        self.before_batch(batch)
        self.batches.append(batch)
        slots = [span.slot for span in batch.spans]
        slots += [capture.slot for span in batch.spans for capture in span.captures]
        assert len(slots) == len(set(slots)), "a slot occurs twice"
        written = [page for span in batch.spans for page in span.pages[span.start // PAGE_TOKENS :]]
        assert len(written) == len(set(written)), "a page is written twice"
        shared = {page for s in batch.spans for page in s.pages[: s.start // PAGE_TOKENS]}
        assert shared.isdisjoint(written), "a page that others read is written"
        assert batch.spans
        return [row for span in batch.spans for row in self._feed(batch, span)]

    def _feed(self, batch: Batch, span: Span) -> list[int]:
        tokens = self.slots[span.slot]
        assert tokens is not None, "an undefined state was used"
        assert len(tokens) == span.start, "the state is at another position"
        assert len(span.tokens), "a span has no tokens"
        assert len(span.pages) * PAGE_TOKENS >= span.end, "the pages are too few"
        if batch.kind == "prefill":
            assert span.start % PAGE_TOKENS == 0, "a prompt is evaluated off the grid"
        else:
            assert len(span.tokens) == 1
        table = self.pages[list(span.pages)].reshape(-1)
        assert table[: span.start].tolist() == tokens, "the pages hold other tokens"
        self.slots[span.slot] = tokens = [*tokens, *span.tokens.tolist()]
        for position in range(span.start, span.end):
            page = span.pages[position // PAGE_TOKENS]
            self.pages[page, position % PAGE_TOKENS] = tokens[position]
        for capture in span.captures:
            assert span.start < capture.position <= span.end
            assert capture.position % PAGE_TOKENS == 0
            self.slots[capture.slot] = tokens[: capture.position]
        return [next_token(tokens)] if span.samples else []

    # ── Backend ───────────────────────────────────────────────────────────────────────────────

    def sample(
        self, logits: list[int], rows: Sequence[SamplingRow], num_tokens: int
    ) -> list[Sampled]:
        """What follows from the tape, or the first token that a mask allows."""
        assert len(logits) == len(rows)
        masks = [row.mask for row in rows]
        tokens = [
            token if mask is None else _first_of(mask)
            for token, mask in zip(logits, masks, strict=True)
        ]
        return [
            Sampled(token, logprobs_of(token, row.params.logprobs))
            for token, row in zip(tokens, rows, strict=True)
        ]

    def wait(self) -> None:
        pass

    def clear_slot(self, slot: int) -> None:
        self.slots[slot] = []

    def copy_slot(self, source: int, target: int) -> None:
        tokens = self.slots[source]
        assert tokens is not None
        self.slots[target] = list(tokens)

    def begin_read(self, slot: int, pages: Sequence[int]) -> Future[Contents]:
        state = np.asarray(self.slots[slot], np.int32).tobytes()
        contents = Contents(state, [self.pages[page].tobytes() for page in pages])
        read: Future[Contents] = Future()
        self._after(self.read_steps, lambda: read.set_result(contents))
        return read

    def begin_write(self, slot: int, state: bytes, pages: Mapping[int, bytes]) -> Writing:
        writing = Writing()
        self.slots[slot] = None
        self.pages[list(pages)] = -1

        def write() -> None:
            if not writing.is_abandoned:
                self.slots[slot] = np.frombuffer(state, np.int32).tolist()
                for page, content in pages.items():
                    self.pages[page] = np.frombuffer(content, np.int32)
            self._after(self.write_steps, lambda: writing.arrived.set_result(None))
            writing.given.set_result(None)

        self._after(self.write_steps, write)
        return writing

    def tick(self) -> None:
        """Time passes for what is under way."""
        self.under_way = [(steps - 1, call) for steps, call in self.under_way]
        due = [call for steps, call in self.under_way if steps <= 0]
        self.under_way = [(steps, call) for steps, call in self.under_way if steps > 0]
        for call in due:
            call()

    def _after(self, steps: int, call: Callable[[], None]) -> None:
        if steps:
            self.under_way.append((steps, call))
        else:
            call()


def _first_of(mask: Mask) -> int:
    return int(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0])
