"""Every stage of the sampler against its plain definition, and the draw against chance."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine import sampler
from daemon.engine.backends.backend import SamplingRow
from daemon.engine.requests import SamplingParams
from daemon.errors import DeviceError

NEUTRAL = SamplingParams()
SLACK = 1e-9
logit_lists = st.lists(
    st.integers(-8, 8).map(float) | st.floats(-30, 30, width=32), min_size=1, max_size=40
)


def row(
    params: SamplingParams,
    seed: int = 0,
    step: int = 0,
    counts: dict[int, tuple[int, int]] | None = None,
) -> SamplingRow:
    return SamplingRow(params, seed, step, counts or {})


def floats(values: list[float]) -> np.ndarray:
    return np.asarray(values, np.float32)


# ── greedy ────────────────────────────────────────────────────────────────────────────────────


@given(values=logit_lists)
def test_greedy_takes_the_first_of_the_best(values: list[float]) -> None:
    chosen = sampler.sample(floats(values), row(SamplingParams(temperature=0.0, top_p=0.1)))
    assert chosen.token == values.index(max(values))
    assert chosen.logprobs is None


@given(values=logit_lists, seed=st.integers(0, 2**64), step=st.integers(0, 10**6))
def test_the_coldest_draw_is_one_of_the_best(values: list[float], seed: int, step: int) -> None:
    for temperature in (5e-324, 1e-12):
        params = SamplingParams(temperature=temperature)
        rounded = [round(value) for value in values]
        chosen = sampler.sample(floats(rounded), row(params, seed, step))
        assert rounded[chosen.token] == max(rounded)


# ── masks ─────────────────────────────────────────────────────────────────────────────────────


@given(
    values=logit_lists,
    seed=st.integers(0, 2**64),
    allowed=st.sets(st.integers(0, 39), min_size=1),
    params=st.sampled_from(
        [
            SamplingParams(temperature=0.0),
            NEUTRAL,
            SamplingParams(top_k=3, top_p=0.5, min_p=0.1),
            SamplingParams(top_k=30, logprobs=2),
        ]
    ),
)
def test_a_mask_leaves_the_others_as_they_are(
    values: list[float], seed: int, allowed: set[int], params: SamplingParams
) -> None:
    """The same draw as from the allowed tokens alone; log-probabilities stay the model's own."""
    ids = sorted(token for token in allowed if token < len(values)) or [0]
    mask = np.packbits(np.isin(np.arange(64), ids), bitorder="little").view(np.uint32)
    chosen = sampler.sample(floats(values), SamplingRow(params, seed, 0, {}, mask))
    alone = sampler.sample(floats([values[token] for token in ids]), row(params, seed))
    assert chosen.token == ids[alone.token]
    if params.logprobs is not None:
        assert chosen.logprobs == sampler.report(floats(values), chosen.token, params.logprobs)


# ── what stays ────────────────────────────────────────────────────────────────────────────────


def plain_shares(values: list[float], temperature: float) -> list[float]:
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


@given(values=logit_lists, temperature=st.floats(0.05, 5))
def test_temperature(values: list[float], temperature: float) -> None:
    ids, shares = sampler.candidates(floats(values), SamplingParams(temperature=temperature))
    by_id = dict(zip(ids.tolist(), shares.tolist(), strict=True))
    expected = plain_shares(floats(values).tolist(), temperature)
    assert [by_id[i] for i in range(len(values))] == pytest.approx(expected)


@given(values=logit_lists, top_k=st.integers(0, 45))
def test_top_k(values: list[float], top_k: int) -> None:
    ids, shares = sampler.candidates(floats(values), SamplingParams(top_k=top_k))
    order = sorted(range(len(values)), key=lambda i: (-floats(values)[i], i))
    assert ids.tolist() == order[: top_k or None]
    assert shares.sum() == pytest.approx(1)


@given(values=logit_lists, top_p=st.floats(0, 1))
def test_top_p(values: list[float], top_p: float) -> None:
    ids, _ = sampler.candidates(floats(values), SamplingParams(top_p=top_p))
    kept = ids.tolist()
    order = sorted(range(len(values)), key=lambda i: (-floats(values)[i], i))
    shares = plain_shares(floats(values).tolist(), 1.0)
    assert kept == order[: len(kept)]
    before_last = sum(shares[i] for i in kept[:-1])
    assert len(kept) == 1 or before_last < top_p + SLACK
    assert len(kept) == len(order) or before_last + shares[kept[-1]] > top_p - SLACK


@given(values=logit_lists, min_p=st.floats(0, 1))
def test_min_p(values: list[float], min_p: float) -> None:
    ids, _ = sampler.candidates(floats(values), SamplingParams(min_p=min_p))
    shares = plain_shares(floats(values).tolist(), 1.0)
    for i, share in enumerate(shares):
        if abs(share - min_p * max(shares)) > SLACK:
            assert (i in ids) == (share > min_p * max(shares))
    assert values.index(max(values)) in ids or min_p > 0


@given(
    values=logit_lists,
    params=st.builds(
        SamplingParams,
        temperature=st.floats(0.01, 3),
        top_k=st.integers(0, 45),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
    ),
)
def test_stages_together(values: list[float], params: SamplingParams) -> None:
    """What stays is sorted, sums to one, keeps the proportions, and always holds the best."""
    ids, shares = sampler.candidates(floats(values), params)
    assert len(ids) >= 1
    assert floats(values)[ids[0]] == floats(values).max()
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 0).all()
    plain = plain_shares(floats(values).tolist(), params.temperature)
    kept = sum(plain[i] for i in ids.tolist())
    assert shares.tolist() == pytest.approx([plain[i] / kept for i in ids.tolist()])


def test_min_p_counts_after_temperature_and_top_p_after_top_k() -> None:
    values = floats([3.0, 2.0, 1.0, 0.0])
    cold = sampler.candidates(values, SamplingParams(temperature=0.5, min_p=0.3))[0]
    warm = sampler.candidates(values, SamplingParams(temperature=2.0, min_p=0.3))[0]
    assert (cold.tolist(), warm.tolist()) == ([0], [0, 1, 2])
    # Of all four, the first two hold 0.88; of the best two, the first alone holds 0.73.
    assert sampler.candidates(values, SamplingParams(top_p=0.7))[0].tolist() == [0, 1]
    assert sampler.candidates(values, SamplingParams(top_p=0.7, top_k=2))[0].tolist() == [0]


# ── penalties and bias ────────────────────────────────────────────────────────────────────────


@given(
    values=logit_lists,
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    data=st.data(),
)
def test_penalties(
    values: list[float], repetition: float, presence: float, frequency: float, data: st.DataObject
) -> None:
    token = st.integers(0, len(values) - 1)
    prompt, reply = data.draw(st.lists(token)), data.draw(st.lists(token))
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    both, replied = Counter(prompt + reply), Counter(reply)
    counts = {token: (n, replied[token]) for token, n in both.items()}
    original = floats(values)
    adjusted = sampler.penalize(original, row(params, counts=counts))
    for i, value in enumerate(original.tolist()):
        expected = value
        if i in both:
            expected = value / repetition if value > 0 else value * repetition
        expected -= presence * (i in replied) + frequency * replied[i]
        assert adjusted[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert original.tolist() == floats(values).tolist()


def test_logit_bias() -> None:
    values = floats([1.0, 2.0, 3.0])
    params = SamplingParams(temperature=0.0, logit_bias=((0, 2.5), (2, -100.0), (7, 9.0)))
    assert sampler.bias(values, params).tolist() == [3.5, 2.0, -97.0]
    assert sampler.sample(values, row(params)).token == 0
    assert values.tolist() == [1.0, 2.0, 3.0]


def test_a_penalty_changes_the_choice_but_not_the_report() -> None:
    values = floats([2.0, 1.9, 0.0])
    params = SamplingParams(temperature=0.0, presence_penalty=1.0, logprobs=1)
    chosen = sampler.sample(values, row(params, counts={0: (1, 1)}))
    assert chosen.token == 1
    assert chosen.logprobs is not None
    assert chosen.logprobs.alternatives[0][0] == 0
    assert chosen.logprobs.chosen < chosen.logprobs.alternatives[0][1]


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────


@given(values=logit_lists, count=st.integers(0, 45))
def test_logprobs(values: list[float], count: int) -> None:
    reported = sampler.report(floats(values), len(values) - 1, count)
    assert reported is not None
    exact = [math.log(share) for share in plain_shares(floats(values).tolist(), 1.0)]
    assert reported.chosen == pytest.approx(exact[-1], abs=1e-6)
    order = sorted(range(len(values)), key=lambda i: (-floats(values)[i], i))
    assert [i for i, _ in reported.alternatives] == order[:count]
    for i, logprob in reported.alternatives:
        assert logprob == pytest.approx(exact[i], abs=1e-6)


# ── the draw ──────────────────────────────────────────────────────────────────────────────────


def test_frequencies_are_the_shares() -> None:
    """Chi-square with 7 degrees of freedom; 24.3 is passed by chance once in a thousand."""
    values = floats([1.0, 0.5, 0.0, -0.5, 1.5, 0.2, -1.0, 0.9])
    shares = plain_shares(values.tolist(), 0.8)
    params = SamplingParams(temperature=0.8)
    count = 4000
    for rows in (
        [row(params, seed=17, step=step) for step in range(count)],
        [row(params, seed=seed, step=3) for seed in range(count)],
    ):
        drawn = Counter(sampler.sample(values, each).token for each in rows)
        expected = [share * count for share in shares]
        distance = sum((drawn[i] - n) ** 2 / n for i, n in enumerate(expected))
        assert distance < 24.3


def test_numbers_are_uniform_and_independent() -> None:
    by_step = np.asarray([sampler.uniform(5, step) for step in range(4096)])
    by_seed = np.asarray([sampler.uniform(seed, 5) for seed in range(4096)])
    for numbers in (by_step, by_seed):
        assert ((numbers >= 0) & (numbers < 1)).all()
        buckets = np.bincount((numbers * 16).astype(int), minlength=16)
        assert ((buckets - 256) ** 2 / 256).sum() < 37.7
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


@given(values=logit_lists, seed=st.integers(0, 2**64), step=st.integers(0, 2**40))
def test_seed_and_step_fix_the_draw(values: list[float], seed: int, step: int) -> None:
    first = sampler.sample(floats(values), row(NEUTRAL, seed, step))
    assert sampler.sample(floats(values), row(NEUTRAL, seed, step)) == first


def test_other_seeds_and_steps_draw_otherwise() -> None:
    values = np.zeros(1000, np.float32)
    drawn = {sampler.sample(values, row(NEUTRAL, seed, 0)).token for seed in range(30)}
    assert len(drawn) > 20
    drawn = {sampler.sample(values, row(NEUTRAL, 0, step)).token for step in range(30)}
    assert len(drawn) > 20


@given(shares=st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), number=st.floats(0, 1))
def test_draw_walks_the_running_sum(shares: list[float], number: float) -> None:
    normed = np.asarray(shares) / sum(shares)
    index = sampler.draw(normed, number)
    assert 0 <= index < len(shares)
    assert normed[:index].sum() <= number + SLACK
    assert index == len(shares) - 1 or number < normed[: index + 1].sum() + SLACK


# ── broken arithmetic ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_the_devices_fault(value: float, temperature: float) -> None:
    with pytest.raises(DeviceError, match="not finite"):
        sampler.sample(floats([0.0, value, 1.0]), row(SamplingParams(temperature=temperature)))
    with pytest.raises(DeviceError, match="not finite"):
        sampler.sample(floats([-math.inf] * 3), row(SamplingParams(temperature=temperature)))


def test_a_masked_token_is_never_drawn() -> None:
    values = floats([0.0, -math.inf, 0.0])
    drawn = {sampler.sample(values, row(NEUTRAL, seed)).token for seed in range(50)}
    assert drawn == {0, 2}
