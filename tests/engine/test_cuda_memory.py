"""A real card: what was planned is what is taken, and snapshots survive the way out and in."""

from pathlib import Path

import numpy as np
import pytest

from daemon.checkpoint import PAGE_TOKENS
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
    pages = tuple(range(slot * 40, slot * 40 + 40))
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
            Span(np.array([3], np.int32), 64, slot, tuple(range(slot * 40, slot * 40 + 40)))
            for slot in range(num_rows)
        )
        model.logits(Batch("decode", spans))
    device.synchronize()
    assert before - device.free_bytes() <= MARGIN_BYTES


def test_snapshots_come_back_bit_for_bit(model: Model) -> None:
    backend = model.backend
    backend.clear_slot(0)
    model.logits(prompt(256, 0))
    state, contents = backend.read_snapshot(0, range(4))
    kept, copies = bytes(state), [bytes(content) for content in contents]
    assert any(kept)
    assert all(any(copy) for copy in copies)
    # From pinned buffers, and from ordinary memory.
    backend.write_snapshot(5, state, dict(zip((100, 101, 102, 103), contents, strict=True)))
    backend.write_snapshot(6, kept, dict(zip((110, 111, 112, 113), copies, strict=True)))
    for slot, first in ((5, 100), (6, 110)):
        again, pages = backend.read_snapshot(slot, range(first, first + 4))
        assert again == kept
        assert [bytes(page) for page in pages] == copies


def test_a_restored_sequence_goes_on_as_if_nothing_had_been(model: Model) -> None:
    backend = model.backend
    backend.clear_slot(1)
    model.logits(prompt(192, 1))
    pages = tuple(range(40, 80))
    state, contents = backend.read_snapshot(1, pages[:3])
    rest = (np.arange(192, 300) * 7 % 512).astype(np.int32)
    straight = model.logits(Batch("prefill", (Span(rest, 192, 1, pages, samples=True),)))
    expected = backend.logits_to_host(straight).copy()
    others = tuple(range(120, 130))
    backend.write_snapshot(7, state, dict(zip(others[:3], contents, strict=True)))
    resumed = model.logits(Batch("prefill", (Span(rest, 192, 7, others, samples=True),)))
    np.testing.assert_array_equal(backend.logits_to_host(resumed), expected)
    assert len(rest) > PAGE_TOKENS


def test_a_cap_is_honoured(model: Model) -> None:
    file = open_gguf(MODEL)
    capped = EngineConfig(device="cuda", gpu_memory_bytes=2**30)
    demand = MemoryDemand(context_length=2**17, num_sequences=4, num_slots=12)
    with pytest.raises(OutOfDeviceMemory, match="would fit"):
        make_backend(capped, file, model_shape(file), demand)
    plan = plan_memory(capped, file, demand)
    assert not plan.fits
    assert plan.budget_bytes == 2**30 - CONTEXT_BYTES - MARGIN_BYTES
