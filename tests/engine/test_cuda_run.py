"""A prefill batch as the kernels read it: every array arrives whole, whatever the batch before."""

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from fake_driver import FakeDriver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.engine.backends.cuda_run import PrefillArrays
from daemon.engine.batch import Batch, Capture, Span
from daemon.kernels.runtime.device import Device

MAX_ROWS, MAX_SPANS, MAX_PAGES = 512, 3, 20


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    spans = []
    for slot in range(draw(st.integers(1, MAX_SPANS))):
        start, count = 64 * draw(st.integers(0, 10)), draw(st.integers(1, MAX_ROWS // MAX_SPANS))
        pages = tuple(draw(st.permutations(range(50)))[: -(-(start + count) // 64)])
        captures = (Capture(start + 64, slot + 9),) if count >= 64 and draw(st.booleans()) else ()
        tokens = np.arange(count, dtype=np.int32) * 3 + slot
        spans.append(Span(tokens, start, slot, pages, captures, draw(st.booleans())))
    return Batch("prefill", tuple(spans))


@given(st.lists(batches(), min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_every_batch_arrives_whole(fake_driver: FakeDriver, several: list[Batch]) -> None:
    device = Device.open()
    arrays = PrefillArrays(device, MAX_ROWS, MAX_SPANS, MAX_PAGES)
    for batch in several:
        run = arrays.run(batch)
        tokens, positions, sequences = (
            device.to_host(array) for array in (run.tokens, run.positions, run.sequences)
        )
        row = 0
        chunks = device.to_host(run.tables.chunks).tolist()
        tiles = {tuple(tile) for tile in device.to_host(run.tiles).tolist()}
        for index, span in enumerate(batch.spans):
            rows = slice(row, row + len(span.tokens))
            np.testing.assert_array_equal(tokens[rows], span.tokens)
            np.testing.assert_array_equal(positions[rows], np.arange(span.start, span.end))
            assert (sequences[rows] == index).all()
            line = device.to_host(run.page_table)[index, : len(span.pages)]
            np.testing.assert_array_equal(line, span.pages)
            for at in range(0, len(span.tokens), 64):
                size = min(64, len(span.tokens) - at)
                captured = [c.slot for c in span.captures if c.position == span.start + at + 64]
                history = span.slot if at == 0 else -1
                assert chunks.pop(0) == [row + at, size, history, *(captured or [-1])]
                assert (row + at, span.start + at, size, index) in tiles
            row += len(span.tokens)
            assert (row - 1 in run.last_rows) == span.samples
        assert run.num_rows == row
        assert not chunks
