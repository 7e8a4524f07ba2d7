"""A real card: what was planned is what is taken, and snapshots survive the way out and in."""

from pathlib import Path

import numpy as np
import pytest

from daemon.config import EngineConfig
from daemon.devices import make_backend, plan_memory
from daemon.engine.batch import Batch, Span
from daemon.engine.memory.memory_plan import (
    CONTEXT_BYTES,
    MARGIN_BYTES,
    PAGES,
    STATES,
    WEIGHTS,
    WORKSPACE,
    MemoryDemand,
)
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.errors import OutOfDeviceMemory

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).parents[1] / "vectors" / "tiny-coder" / "tiny-coder-BF16.gguf"
CONFIG = EngineConfig(device="cuda", key_format="q8_0", value_format="q8_0")
DEMAND = MemoryDemand(context_length=2048, num_sequences=4, num_slots=12)


@pytest.fixture(scope="module")
def model() -> Model:
    file = open_gguf(MODEL)
    model = load_model(file, make_backend(CONFIG, file, model_shape(file), DEMAND))
    model.backend.allocate(model.shape, DEMAND.num_slots, DEMAND.most_pages)
    return model


def prompt(num_tokens: int, slot: int) -> Batch:
    pages = tuple(range(slot * 32, slot * 32 + 32))
    tokens = (np.arange(num_tokens) * 7 % 512).astype(np.int32)
    return Batch("prefill", (Span(tokens, 0, slot, pages, samples=True),))


def test_regions_are_used_as_planned(model: Model) -> None:
    device, plan = model.backend._device, model.backend._plan  # type: ignore[attr-defined]
    for region in (WEIGHTS, STATES, PAGES):
        assert device.used_bytes_of(region) == plan.regions[region]
    assert device.used_bytes_of(WORKSPACE) <= plan.regions[WORKSPACE]


def test_what_runs_outside_of_the_regions_stays_within_the_margin(model: Model) -> None:
    device = model.backend._device  # type: ignore[attr-defined]
    before = device.free_bytes()
    for num_tokens in (1, 64, 700, 2048):
        model.logits(prompt(num_tokens, 0))
    for slot in range(4):
        model.logits(prompt(64, slot))
    for num_rows in (1, 2, 4, 4, 2, 1):
        spans = tuple(
            Span(np.array([3], np.int32), 64, slot, tuple(range(slot * 32, slot * 32 + 32)))
            for slot in range(num_rows)
        )
        model.logits(Batch("decode", spans))
    device.synchronize()
    assert before - device.free_bytes() <= MARGIN_BYTES


def test_snapshots_come_back_bit_for_bit(model: Model) -> None:
    backend = model.backend
    backend.clear_slot(0)
    model.logits(prompt(256, 0))
    state, contents = backend.begin_read(0, range(4)).result()
    kept, copies = bytes(state), [bytes(content) for content in contents]
    assert any(kept)
    assert all(any(copy) for copy in copies)
    # From pinned buffers, from ordinary memory, and from some of both in another order.
    mixed = [contents[0], copies[1], contents[2], copies[3]]
    restores = [
        backend.begin_write(5, state, dict(zip((100, 101, 102, 103), contents, strict=True))),
        backend.begin_write(6, kept, dict(zip((110, 111, 112, 113), copies, strict=True))),
        backend.begin_write(8, state, dict(zip((123, 120, 122, 121), mixed, strict=True))),
    ]
    for slot, pages in ((5, range(100, 104)), (6, range(110, 114)), (8, (123, 120, 122, 121))):
        again, found = backend.begin_read(slot, pages).result()
        assert again == kept
        assert [bytes(page) for page in found] == copies
    for restore in restores:
        restore.arrived.result()


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_restored_sequence_goes_on_as_if_nothing_had_been(model: Model, is_pinned: bool) -> None:
    backend = model.backend
    backend.clear_slot(1)
    model.logits(prompt(1984, 1))
    pages = tuple(range(32, 64))
    state, contents = backend.begin_read(1, pages[:31]).result()
    if not is_pinned:
        state, contents = bytes(state), [bytes(content) for content in contents]
    rest = (np.arange(1984, 2040) * 7 % 512).astype(np.int32)
    straight = model.logits(Batch("prefill", (Span(rest, 1984, 1, pages, samples=True),)))
    expected = backend.logits_to_host(straight).copy()
    for round in range(20):
        others = tuple(range(65 - round % 2, 97 - round % 2))
        # Whatever lies there is in use until now, and none of it may be seen.
        model.logits(Batch("prefill", (Span(rest, 0, 7, others, samples=True),)))
        restore = backend.begin_write(7, state, dict(zip(others[:31], contents, strict=True)))
        restore.given.result()
        resumed = model.logits(Batch("prefill", (Span(rest, 1984, 7, others, samples=True),)))
        np.testing.assert_array_equal(backend.logits_to_host(resumed), expected)


def test_places_of_an_abandoned_restore_are_used_at_once(model: Model) -> None:
    backend = model.backend
    backend.clear_slot(2)
    batch = prompt(1024, 2)
    expected = backend.logits_to_host(model.logits(batch)).copy()
    state, contents = backend.begin_read(2, range(64, 80)).result()
    noise = [bytes(len(content)) for content in contents]
    for _ in range(20):
        backend.begin_write(2, bytes(len(state)), dict(zip(range(64, 80), noise, strict=True)))
        backend.begin_write(2, state, dict(zip(range(64, 80), noise, strict=True))).abandon()
        backend.clear_slot(2)
        np.testing.assert_array_equal(backend.logits_to_host(model.logits(batch)), expected)


def test_steps_go_on_while_snapshots_are_read(model: Model) -> None:
    backend = model.backend
    for slot in (0, 3):
        backend.clear_slot(slot)
    model.logits(prompt(512, 0))
    state, contents = backend.begin_read(0, range(8)).result()
    kept, copies = bytes(state), [bytes(content) for content in contents]
    readings = []
    for _ in range(8):
        readings.append(backend.begin_read(0, range(8)))
        backend.clear_slot(3)
        model.logits(prompt(512, 3))
    # The slot and the pages that are still being read are written by the next sequence.
    backend.clear_slot(0)
    model.logits(prompt(320, 0))
    for reading in readings:
        found, pages = reading.result()
        assert found == kept
        assert [bytes(page) for page in pages] == copies


def test_a_cap_is_honoured(model: Model) -> None:
    file = open_gguf(MODEL)
    capped = EngineConfig(device="cuda", gpu_memory_bytes=2**30)
    demand = MemoryDemand(context_length=2**17, num_sequences=4, num_slots=12)
    with pytest.raises(OutOfDeviceMemory, match="would fit"):
        make_backend(capped, file, model_shape(file), demand)
    plan = plan_memory(capped, file, demand)
    assert not plan.fits
    assert plan.budget_bytes == 2**30 - CONTEXT_BYTES - MARGIN_BYTES
