"""Every cause of a miss, from what is known of the nearest earlier prompt and of the store."""

from typing import Any

import msgspec
import pytest

from daemon.api.cache_plan import CachePlan, Draft, anthropic_miss_reason, plan_of
from daemon.checkpoint import Departed, Departure, Found, Reach
from daemon.text.prompt_difference import Difference
from daemon.text.prompt_history import Nearest, PastPrompt, PromptHistory

PAST = PastPrompt(
    id="earlier",
    session="s",
    tokens=PromptHistory.tokens(range(4000)),
    num_prompt=4000,
    num_evaluated=4000,
    began_s=90.0,
    state="ended",
)
EDIT = Difference(
    position=1000,
    message=3,
    role="tool",
    part="tool_result",
    tool=None,
    change="client_edit",
    shared="both",
    before="then",
    after="now",
)
SYSTEM_END = Found(512, "prompt", "system", "host")


def draft(**changes: Any) -> Draft:
    """A prompt of 4,096 tokens that begins like the earlier one, all of it."""
    fields: dict[str, Any] = {
        "id": "r",
        "session": "s",
        "created_s": 100.0,
        "num_prompt": 4096,
        "num_generation": 4,
        "reach": Reach(SYSTEM_END),
        "nearest": Nearest(PAST, 4000, 96),
        "difference": None,
    }
    return Draft(**fields | changes)


def plan(found: Found | None = SYSTEM_END, **changes: Any) -> CachePlan:
    return plan_of(draft(**changes), found, "ended", 0.001)


def nearest(num_common: int = 4000, num_new: int = 96, **changes: Any) -> Nearest:
    return Nearest(msgspec.structs.replace(PAST, **changes), num_common, num_new)


def test_what_is_lost_is_what_had_been_evaluated() -> None:
    told = plan()
    assert (told.evaluated_tokens, told.new_tokens, told.lost_tokens) == (3584, 96, 3488)
    assert (told.prompt_s, told.lost_s) == (3.584, 3.488)
    assert told.nearest is not None
    assert told.nearest.age_s == 10
    assert told.summary == (
        "512 of 4,096 tokens reused from memory. 3,488 evaluated again: no checkpoint lies nearer."
    )


def test_a_request_that_followed_another_says_so() -> None:
    told = plan_of(draft(), SYSTEM_END, "ended", 0.001, followed_s=0.3512)
    assert told.restored.followed_s == 0.3512
    assert "followed_s=0.3512; " in told.header()
    assert told.summary.startswith(
        "512 of 4,096 tokens reused from a request in flight, after 0.35 s."
    )
    assert "followed" not in plan().header()


@pytest.mark.parametrize("cause", ["evicted", "dropped", "damaged", "wiped"])
def test_a_checkpoint_that_went(cause: Departure) -> None:
    assert plan(reach=Reach(SYSTEM_END, Departed(3968, cause))).cause == cause
    near = Reach(SYSTEM_END, Departed(576, cause))
    assert plan(reach=near).cause == "no_checkpoint"


def test_an_earlier_request_that_did_not_come_so_far() -> None:
    for state, cause in (("running", "still_running"), ("cancelled", "cancelled")):
        assert plan(nearest=nearest(state=state, num_evaluated=512)).cause == cause
        assert plan(nearest=nearest(state=state)).cause == "no_checkpoint"


def test_a_request_that_was_cancelled_counts_what_it_did() -> None:
    changed = draft(nearest=nearest(1000, 3000), reach=Reach(None))
    for num_done, lost, new in ((600, 600, 0), (2000, 1096, 904), (9999, 1096, 3000)):
        told = plan_of(changed, None, "cancelled", 0.001, num_done=num_done)
        assert (told.lost_tokens, told.new_tokens) == (lost, new)
        assert told.evaluated_tokens == lost + new


def test_another_model() -> None:
    told = plan(None, nearest=nearest(model="abcdef", state="stored"), reach=Reach(None))
    assert told.cause == "other_model"
    assert told.nearest is not None
    assert (told.nearest.model, told.nearest.request) == ("abcdef", "")
    assert anthropic_miss_reason(told) == ("model_changed", 4000)


def test_the_larger_loss_is_named() -> None:
    """An edit in the middle, and a checkpoint far before it: whichever cost more."""
    near, far = Found(960, "prompt", "user", "disk"), Found(64, "prompt", "system", "disk")
    edited = {"nearest": nearest(1000, 96), "difference": EDIT}
    assert plan(near, **edited).cause == "client_edit"
    assert plan(far, nearest=nearest(1000, 3000), difference=EDIT).cause == "no_checkpoint"
    assert anthropic_miss_reason(plan(near, **edited)) == ("messages_changed", 3040)


def test_what_the_grid_costs_is_no_loss() -> None:
    last = Found(3968, "prompt", "prompt", "device")
    told = plan(last)
    assert (told.cause, told.lost_tokens, told.new_tokens) == (None, 0, 128)
    assert anthropic_miss_reason(told) is None


def test_a_first_prompt() -> None:
    told = plan(None, nearest=None, reach=Reach(None))
    assert (told.cause, told.new_tokens, told.lost_tokens) == ("never_seen", 4096, 0)
    assert anthropic_miss_reason(told) == ("previous_message_not_found", 0)


def test_the_header_has_no_text() -> None:
    header = plan(nearest=nearest(1000, 96), difference=EDIT).header()
    assert header == (
        "restored=512; tier=host; common=1000; evaluated=3584; new=96; lost=3488; "
        "cause=client_edit; at=1000; message=3; role=tool; part=tool_result"
    )
