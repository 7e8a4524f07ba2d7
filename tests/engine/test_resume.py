"""The two truths of the engine: resumed equals cold, and batched equals alone, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
from builders import SMALL_MOE, write_model
from engine_harness import EngineHarness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from truths import (
    Golden,
    check_any_timing_equals_cold,
    check_batched_equals_alone,
    check_greedy_tokens,
    check_resumed_equals_cold,
    cold,
    random_prompts,
)

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.backends.numpy_backend import NumpyBackend
from daemon.engine.model.model import Model
from daemon.engine.requests import SamplingParams
from daemon.engine.weights.gguf import open_gguf
from daemon.engine.weights.loader import load_model, model_shape

DECODED_STATE_BOUND = 0.05
"""Largest difference of a logit between a resumed decode-born state and a cold evaluation."""


def test_greedy_tokens_equal_the_golden_ones(tiny_coder: Model, golden: Golden) -> None:
    check_greedy_tokens(tiny_coder, golden)


def test_any_timing_of_restores_equals_cold(tiny_coder: Model, golden: Golden) -> None:
    check_any_timing_equals_cold(tiny_coder, golden, num_rounds=1)


@pytest.mark.parametrize("position", [64, 128, 704, 1536])
def test_resumed_from_any_prompt_position_equals_cold(
    tiny_coder: Model, golden: Golden, position: int
) -> None:
    check_resumed_equals_cold(tiny_coder, golden, position)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    keep=st.integers(1, 1500),
    extra=st.lists(st.integers(0, 8000), min_size=1, max_size=150),
    prefill_tokens=st.sampled_from([64, 192, 512]),
    boundaries=st.lists(st.integers(1, 1500), max_size=3),
)
def test_edited_prompts_equal_cold(
    tiny_coder: Model,
    golden: Golden,
    keep: int,
    extra: list[int],
    prefill_tokens: int,
    boundaries: list[int],
) -> None:
    ids = golden["7_ids"]
    edited = np.concatenate([ids[:keep], np.asarray(extra)])
    store = MemoryStore(interval=256)
    EngineHarness(tiny_coder, store).generate(ids, boundaries=boundaries)
    harness = EngineHarness(tiny_coder, store, strict=True, prefill_tokens=prefill_tokens)
    reply = harness.generate(edited, max_tokens=4)
    assert reply.num_cached >= min(keep, len(edited) - 1) // 256 * 256
    logits, tokens = cold(tiny_coder, edited, max_tokens=4)
    assert np.array_equal(harness.last_prompt_logits(edited), logits)
    assert reply.tokens == tokens


def test_batched_equals_alone(tiny_coder: Model, golden: Golden) -> None:
    check_batched_equals_alone(tiny_coder, golden)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random, of the reference backend."""
    file = open_gguf(write_model(tmp_path_factory.mktemp("experts") / "random.gguf", SMALL_MOE))
    return load_model(file, NumpyBackend(model_shape(file).rms_eps))


def test_experts_too_are_batched_as_alone_and_resumed_as_cold(experts: Model) -> None:
    prompts = random_prompts(SMALL_MOE.vocab)
    check_batched_equals_alone(experts, prompts)
    check_resumed_equals_cold(experts, prompts, 640)


def test_sampled_reply_is_the_same_alone_and_in_company(tiny_coder: Model, golden: Golden) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=7, repetition_penalty=1.1)
    alone = EngineHarness(tiny_coder).generate(golden["1_ids"], max_tokens=30, sampling=sampling)
    harness = EngineHarness(tiny_coder)
    others = [harness.submit(golden[f"{i}_ids"], max_tokens=40) for i in (2, 4)]
    reply = harness.submit(golden["1_ids"], max_tokens=30, sampling=sampling)
    harness.run()
    assert reply.tokens == alone.tokens
    assert len(others[1].tokens) == 40


def test_reply_checkpoint_is_found_when_the_history_comes_back(
    tiny_coder: Model, golden: Golden
) -> None:
    ids = golden["1_ids"].tolist()
    store = MemoryStore()
    first = EngineHarness(tiny_coder, store).generate(ids, max_tokens=200)
    follow_up = [*ids, *first.tokens, *golden["5_ids"].tolist()]
    harness = EngineHarness(tiny_coder, store)
    reply = harness.generate(follow_up, max_tokens=12)
    assert reply.num_cached == (len(ids) + 200 - 1) // PAGE_TOKENS * PAGE_TOKENS
    strict = EngineHarness(tiny_coder, store, strict=True)
    strict_reply = strict.generate(follow_up, max_tokens=12)
    assert strict_reply.num_cached == 0
    difference = harness.last_prompt_logits(follow_up) - strict.last_prompt_logits(follow_up)
    assert np.abs(difference).max() < DECODED_STATE_BOUND
    assert reply.tokens == strict_reply.tokens


@pytest.mark.parametrize("index", range(8))
def test_decoded_states_continue_the_golden_replies(
    tiny_coder: Model, golden: Golden, index: int
) -> None:
    """From a state born by decoding, the greedy tokens are still the golden ones."""
    ids, greedy = golden[f"{index}_ids"].tolist(), golden[f"{index}_greedy"].tolist()
    store = MemoryStore()
    EngineHarness(tiny_coder, store).generate(ids, max_tokens=len(greedy))
    for split in range(1, len(greedy)):
        if (len(ids) + split) % PAGE_TOKENS == 1 and len(ids) < len(ids) + split - 1:
            harness = EngineHarness(tiny_coder, store)
            reply = harness.generate(ids + greedy[:split], max_tokens=len(greedy) - split)
            assert reply.num_cached == len(ids) + split - 1
            assert reply.tokens == greedy[split:]


def test_damaged_checkpoint_is_a_miss(tiny_coder: Model, golden: Golden) -> None:
    ids = golden["3_ids"]
    store = MemoryStore()
    EngineHarness(tiny_coder, store).generate(ids, boundaries=[64, 128])
    store.lose(tuple(int(t) for t in ids[:128]), "prompt")
    reply = EngineHarness(tiny_coder, store).generate(ids)
    assert reply.num_cached == 64
    assert reply.tokens == cold(tiny_coder, ids)[1]


def test_preempted_sequence_goes_on_where_it_was(tiny_coder: Model, golden: Golden) -> None:
    """With too few pages for all, the youngest gives way, and every reply is still right."""
    prompts = [golden["3_ids"], golden["2_ids"]]
    alone = [cold(tiny_coder, prompt, max_tokens=150)[1] for prompt in prompts]
    harness = EngineHarness(tiny_coder, num_pages=6)
    replies = [harness.submit(prompt, max_tokens=150) for prompt in prompts]
    harness.run()
    assert [len(reply.tokens) for reply in replies] == [150, 150]
    assert replies[0].tokens == alone[0]
    assert harness.engine.scheduler.places.pages.num_free == 6


def test_cancelled_prefill_is_kept(load_tiny_coder: Callable[[], Model], golden: Golden) -> None:
    ids = golden["7_ids"]
    model = load_tiny_coder()
    harness = EngineHarness(model, MemoryStore(interval=10**9), prefill_tokens=128)
    first = harness.submit(ids)
    for _ in range(3):
        harness.engine.step()
    harness.engine.cancel("r1")
    assert first.finished.reason == "cancelled"
    assert not harness.engine.sequences
    retry = harness.generate(ids)
    assert retry.num_cached == 3 * 128
    assert retry.tokens == cold(model, ids)[1]
