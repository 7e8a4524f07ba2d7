"""What must hold on every backend, bit for bit: resumed equals cold, and batched equals alone."""

import numpy as np
from engine_harness import EngineHarness
from memory_store import MemoryStore

from daemon.engine.model.model import Model

Golden = dict[str, np.ndarray]


def random_prompts(vocab: int) -> Golden:
    """As many prompts as the golden file has; two of those batched together are equally long."""
    rng = np.random.default_rng(1)
    lengths = (40, 1, 65, 130, 20, 200, 64, 700)
    return {
        f"{i}_ids": rng.integers(0, vocab, length).astype(np.int32)
        for i, length in enumerate(lengths)
    }


def cold(model: Model, tokens: np.ndarray, max_tokens: int = 8) -> tuple[np.ndarray, list[int]]:
    """Logits of the prompt's last row and the greedy reply, with nothing to resume from."""
    harness = EngineHarness(model, MemoryStore(interval=10**9))
    reply = harness.generate(tokens, max_tokens=max_tokens)
    assert reply.num_cached == 0
    return harness.last_prompt_logits(tokens), reply.tokens


def check_greedy_tokens(model: Model, golden: Golden) -> None:
    harness = EngineHarness(model)
    replies = []
    for i in range(8):
        expected = golden[f"{i}_greedy"]
        replies.append((harness.submit(golden[f"{i}_ids"], max_tokens=len(expected)), expected))
    harness.run()
    for reply, expected in replies:
        assert reply.tokens == expected.tolist()


def check_resumed_equals_cold(
    model: Model, golden: Golden, position: int, prefill_tokens: int = 256
) -> None:
    ids = golden["7_ids"]
    logits, tokens = cold(model, ids)
    store = MemoryStore(interval=10**9)
    EngineHarness(model, store).generate(ids, boundaries=[position])
    harness = EngineHarness(model, store, strict=True, prefill_tokens=prefill_tokens)
    reply = harness.generate(ids)
    assert reply.num_cached == position
    assert np.array_equal(harness.last_prompt_logits(ids), logits)
    assert reply.tokens == tokens


def check_batched_equals_alone(model: Model, golden: Golden) -> None:
    prompts = [golden[f"{i}_ids"] for i in (3, 2, 5, 0)] + [golden["7_ids"][:200]]
    alone = [cold(model, prompt, max_tokens=20) for prompt in prompts]
    harness = EngineHarness(model, prefill_tokens=128)
    replies = [harness.submit(prompt, max_tokens=20) for prompt in prompts]
    harness.run()
    for prompt, reply, (logits, tokens) in zip(prompts, replies, alone, strict=True):
        assert np.array_equal(harness.last_prompt_logits(prompt), logits)
        assert reply.tokens == tokens


def check_any_timing_equals_cold(model: Model, golden: Golden, num_rounds: int) -> None:
    """Checkpoints on their way while others decode, are cancelled, and leave their places."""
    ids = golden["7_ids"]
    prompts = [ids[:800], ids[:1600], golden["3_ids"]]
    alone = [cold(model, prompt)[1] for prompt in prompts]
    store = MemoryStore(interval=10**9)
    EngineHarness(model, store).generate(ids, boundaries=[704, 1536])
    harness = EngineHarness(model, store, strict=True, max_sequences=3, num_pages=64)
    rng = np.random.default_rng(11)
    for _ in range(num_rounds):
        order = rng.permutation(len(prompts)).tolist()
        replies = {index: harness.submit(prompts[index]) for index in order}
        for _ in range(rng.integers(0, 12)):
            harness.engine.step()
        cancelled = order[0]
        harness.engine.cancel(f"r{harness.num_requests - len(prompts) + 1}")
        harness.run()
        for index, reply in replies.items():
            assert index == cancelled or reply.tokens == alone[index]
