"""What a model takes of a card, and what fits: found from shapes, without a GPU."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensor_tables import tensor_table

from daemon.checkpoint import PAGE_TOKENS
from daemon.engine.memory.memory_plan import (
    CONTEXT_BYTES,
    MARGIN_BYTES,
    PAGES,
    STATES,
    MemoryDemand,
    MemoryNeeds,
    MemoryPlan,
    Room,
)
from daemon.errors import OutOfDeviceMemory, UnsupportedModel

GIBIBYTE = 2**30


def plan_with(budget: int | None, needs: MemoryNeeds, demand: MemoryDemand) -> MemoryPlan:
    return MemoryPlan(card="a card", demand=demand, needs=needs, budget_bytes=budget)


def some_needs(**changes: int) -> MemoryNeeds:
    sizes = {
        "weights_bytes": 1000, "states_bytes": 200, "workspace_bytes": 300, "page_bytes": 10,
        "num_slots": 6,
    }  # fmt: skip
    return MemoryNeeds(formats=(), **(sizes | changes))


DEMAND = MemoryDemand(context_length=640, num_sequences=3, num_slots=6)


def test_the_27b_file_with_131072_tokens_of_q8_0_fits_24_gib() -> None:
    pytest.importorskip("cuda.core")
    from daemon.engine.backends.cuda_memory import CudaLimits
    from daemon.engine.backends.cuda_plan import memory_needs
    from daemon.kernels.kv_format import KvFormat
    from daemon.kernels.runtime.paper_device import TYPICAL_CARD

    q8_0 = KvFormat.Q8_0
    demand = MemoryDemand(context_length=131_072, num_sequences=4, num_slots=12)
    limits = CudaLimits(context_length=131_072, k_format=q8_0, v_format=q8_0)
    needs = memory_needs(tensor_table("27b"), TYPICAL_CARD, limits, demand.num_slots)
    assert needs.page_bytes == 16 * 2 * 4 * 272 * PAGE_TOKENS
    plan = plan_with(24 * GIBIBYTE - CONTEXT_BYTES - MARGIN_BYTES, needs, demand)
    assert sum(row.num_bytes for row in needs.formats) == pytest.approx(16.53e9, rel=1e-3)
    # Packed, the weights are as large as in the file; only tables of work come on top.
    assert needs.weights_bytes < 1.002 * sum(row.num_bytes for row in needs.formats)
    assert plan.fits
    assert plan.spare_bytes > 1.3 * GIBIBYTE
    assert plan.num_pages > demand.least_pages
    assert sum(plan.regions.values()) <= plan.budget_bytes  # type: ignore[operator]


def test_a_plan_that_fits_shares_out_the_rest() -> None:
    plan = plan_with(1500 + 10 * 11 + 55, some_needs(), DEMAND)
    assert (plan.required_bytes, plan.spare_bytes, plan.num_pages) == (1610, 55, 16)
    assert plan.fitting_tokens == 15 * PAGE_TOKENS
    plan.check()
    assert plan_with(10**6, some_needs(), DEMAND).num_pages == 31


def test_half_of_what_is_left_is_for_states_inside_messages() -> None:
    demand = msgspec.structs.replace(DEMAND, has_inner_states=True)
    needs = some_needs()
    assert needs.state_bytes == 33
    everything = needs.fixed_bytes + demand.most_pages * needs.page_bytes

    def count(spare_bytes: int) -> int:
        return plan_with(everything + spare_bytes, needs, demand).num_inner_slots

    assert [count(2 * 33 * states) for states in (15, 16, 100, 257)] == [0, 16, 100, 256]
    assert count(-1) == 0
    plan = plan_with(everything + 2 * 33 * 20, needs, demand)
    assert plan.room == Room(demand.most_pages, 20)
    assert plan.regions[STATES] == needs.states_bytes + 20 * 33
    assert plan_with(10**6, needs, DEMAND).room == Room(demand.most_pages)


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    plan = plan_with(1500 + 10 * 7, some_needs(), DEMAND)
    with pytest.raises(OutOfDeviceMemory, match=r"640 tokens does not fit.* 384 tokens would"):
        plan.check()
    with pytest.raises(OutOfDeviceMemory, match="no context fits"):
        plan_with(1400, some_needs(), DEMAND).check()


def test_without_a_budget_the_least_is_planned() -> None:
    plan = plan_with(None, some_needs(), DEMAND)
    assert (plan.fits, plan.fitting_tokens, plan.num_pages) == (True, None, 11)


@given(
    st.integers(-1000, 10**5), st.integers(1, 3000), st.integers(1, 16), st.integers(1, 5000),
    st.booleans(),
)  # fmt: skip
def test_regions_never_exceed_a_budget_that_fits(
    budget: int, context: int, sequences: int, page: int, has_inner_states: bool
) -> None:
    demand = MemoryDemand(
        context_length=context,
        num_sequences=sequences,
        num_slots=2,
        has_inner_states=has_inner_states,
    )
    plan = plan_with(budget, some_needs(page_bytes=page), demand)
    assert demand.least_pages <= plan.num_pages <= demand.most_pages
    assert plan.regions[PAGES] == plan.num_pages * page
    assert plan.fits == (sum(plan.regions.values()) <= budget)
    assert plan.fits == (plan.fitting_tokens is not None and plan.fitting_tokens >= context)


def test_a_file_that_the_gpu_cannot_run_is_refused_on_paper() -> None:
    pytest.importorskip("cuda.core")
    from msgspec.structs import replace

    from benchmarks.model_sizes import TINY_DENSE
    from daemon.engine.backends.cuda_memory import CudaLimits
    from daemon.engine.backends.cuda_plan import memory_needs
    from daemon.kernels.runtime.paper_device import TYPICAL_CARD

    limits = CudaLimits(context_length=1024)
    with pytest.raises(UnsupportedModel, match="128"):
        memory_needs(tensor_table(replace(TINY_DENSE, head_dim=128)), TYPICAL_CARD, limits, 2)
