"""Requests that share their beginnings in flight, computed by the reference: equal to alone."""

import msgspec
import numpy as np
import pytest
from builders import resized
from engine_harness import EngineHarness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from truths import cold

from benchmarks.make_model import make_model
from benchmarks.model_sizes import TINY_DENSE
from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.model.model import Model
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    make_model(path, resized(TINY_DENSE, hidden=128, dense_dim=128, vocab=1024), "bf16")
    file = open_gguf(path)
    return load_model(file, NumpyBackend(model_shape(file).rms_eps))


def draw_prompts(data: st.DataObject) -> list[list[int]]:
    """Branches of branches."""
    tokens = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 1000, (5, 400))
    prompts = [tokens[0, : data.draw(st.integers(1, 400))].tolist()]
    for own in tokens[1 : data.draw(st.integers(2, 5))]:
        parent = prompts[data.draw(st.integers(0, len(prompts) - 1))]
        kept = parent[: data.draw(st.integers(0, len(parent)))]
        prompts.append([*kept, *own[: data.draw(st.integers(1, 150))].tolist()])
    return prompts


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_tree_of_prompts_answers_as_alone_and_is_evaluated_once(
    model: Model, data: st.DataObject
) -> None:
    """Some arrive later and some are cancelled: then others may evaluate more, and answer alike."""
    prompts = draw_prompts(data)
    alone = [cold(model, np.asarray(tokens), max_tokens=3) for tokens in prompts]
    harness = EngineHarness(model, MemoryStore(interval=10**9), strict=True)
    scheduler = harness.engine.scheduler
    num_resident = data.draw(st.sampled_from([0, 8]))
    scheduler.limits = msgspec.structs.replace(scheduler.limits, max_residents=num_resident)
    scheduler.strict = True
    pauses = [data.draw(st.integers(0, 2)) for _ in prompts]
    cancelled = data.draw(st.sampled_from([None, 0, 1]))
    replies = []
    for tokens, pause in zip(prompts, pauses, strict=True):
        replies.append(harness.submit(tokens, max_tokens=3))
        for _ in range(pause):
            harness.engine.step()
    if cancelled is not None:
        harness.engine.cancel(f"r{cancelled + 1}")
    harness.run()
    for index, (reply, (logits, tokens)) in enumerate(zip(replies, alone, strict=True)):
        if index != cancelled:
            assert reply.tokens == tokens
            rows = [row for end, _, row in harness.model.rows if end == len(prompts[index])]
            assert any(np.array_equal(row, logits) for row in rows)
    if cancelled is None and not any(pauses[:-1]):
        assert [reply.num_cached for reply in replies] == expected_cached(prompts)


def expected_cached(prompts: list[list[int]]) -> list[int]:
    """What each begins with that an earlier one has, on the grid, but for its last token."""
    expected = []
    for index, tokens in enumerate(prompts):
        limit = (len(tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS
        commons = [min(_num_common(tokens, other), limit) for other in prompts[:index]]
        expected.append(max(commons, default=0))
    return expected


def _num_common(one: list[int], other: list[int]) -> int:
    size = min(len(one), len(other))
    first = next((i for i in range(size) if one[i] != other[i]), size)
    return first // PAGE_TOKENS * PAGE_TOKENS
