"""Why a request reused what it did and no more: its plan, for people and programs.

Owns the plan's form, the cause of a miss and its wording. Drafts are made on the prompt thread;
the rest is pure.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import msgspec
from msgspec import Struct

from daemon.checkpoint import PAGE_TOKENS, Departure, Found, Reach, Tier
from daemon.text.prompt import Prompt
from daemon.text.prompt_difference import Change, Difference, find_difference
from daemon.text.prompt_history import Nearest, PastPrompt, PromptHistory
from daemon.text.tokenizer import Tokenizer

Cause = Literal[Change, Departure, "other_model", "cancelled", "still_running", "no_checkpoint"]
"""Why tokens that had been seen were evaluated again."""

Status = Literal["dry_run", "waiting", "running", "ended", "cancelled", "failed"]

AskReach = Callable[[Sequence[int]], Reach]
"""What the store has of a prompt; memory only, any thread."""


class Restored(Struct, frozen=True):
    """The checkpoint that a request goes on from; `tokens` 0 and the rest None when there is
    none. `followed_s`: how long it waited for a request in flight to come so far, if it did."""

    tokens: int
    tier: Tier | None = None
    reason: str | None = None
    born: str | None = None
    followed_s: float | None = None


class NearestRequest(Struct, frozen=True):
    """The earlier request that this one is most like. `request` is "" when it was of an earlier
    run; both began with the same `common_tokens`."""

    request: str
    session: str
    model: str
    common_tokens: int
    age_s: float
    state: str


class CachePlan(Struct, frozen=True, kw_only=True):
    """What a request reuses and why not more.

    Of `evaluated_tokens`, `new_tokens` stand nowhere in the nearest earlier request, and
    `lost_tokens` had been evaluated for it before; `lost_s` is what these cost. Times are
    estimates while the request has not ended. `normalised` are the rules that changed the prompt.
    """

    object: str = "cache.plan"
    request: str
    session: str
    status: Status
    created: int
    prompt_tokens: int
    restored: Restored
    evaluated_tokens: int
    new_tokens: int
    lost_tokens: int
    prompt_s: float
    lost_s: float
    cause: Cause | None
    summary: str
    nearest: NearestRequest | None
    difference: Difference | None
    normalised: tuple[str, ...] = ()

    def without_text(self) -> "CachePlan":
        """The same for others than who asked."""
        if self.difference is None:
            return self
        bare = msgspec.structs.replace(self.difference, shared="", before="", after="")
        return msgspec.structs.replace(self, difference=bare)

    def header(self) -> str:
        """The plan in one line of ASCII, for `X-Cache-Plan`; no text of any prompt."""
        difference = self.difference
        is_foreseen = self.status in ("dry_run", "waiting")
        fields = {
            "foreseen": "yes" if is_foreseen else None,
            "restored": self.restored.tokens,
            "tier": self.restored.tier,
            "followed_s": self.restored.followed_s,
            "common": self.nearest.common_tokens if self.nearest else None,
            "evaluated": self.evaluated_tokens,
            "new": self.new_tokens,
            "lost": self.lost_tokens,
            "cause": self.cause,
            "at": difference.position if difference else None,
            "message": difference.message if difference else None,
            "role": difference.role if difference else None,
            "part": difference.part if difference else None,
            "normalised": ",".join(self.normalised) or None,
        }
        return "; ".join(f"{name}={value}" for name, value in fields.items() if value is not None)


class Draft(Struct, frozen=True, kw_only=True):
    """All that is known of a request before it is evaluated."""

    id: str
    session: str
    created_s: float
    num_prompt: int
    num_generation: int
    reach: Reach
    nearest: Nearest | None
    difference: Difference | None
    normalised: tuple[str, ...] = ()


class CachePlanner:
    """Compares prompts with those before them.

    Args:
        reach: what the store has of a prompt.
        is_shared: several people ask, and none is shown text of another's session.
    """

    def __init__(
        self, tokenizer: Tokenizer, history: PromptHistory, reach: AskReach, is_shared: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._history = history
        self._reach = reach
        self._is_shared = is_shared

    def draft(self, request_id: str, prompt: Prompt, session: str) -> Draft:
        """Look for the nearest earlier prompt and the nearest checkpoint."""
        nearest = self._history.nearest(prompt.tokens, session)
        difference = None
        if nearest is not None:
            difference = find_difference(
                self._tokenizer, self._history.shape, prompt, nearest, session
            )
            if self._is_shared and nearest.past.session != session:
                nearest, difference = _veiled(nearest, difference)
        return Draft(
            id=request_id,
            session=session,
            created_s=time.time(),
            num_prompt=len(prompt.tokens),
            num_generation=len(prompt.generation),
            reach=self._reach(prompt.tokens),
            nearest=nearest,
            difference=difference,
            normalised=prompt.normalised,
        )

    def remember(self, draft: Draft, prompt: Prompt) -> None:
        """Let later prompts be compared with this one."""
        self._history.add(
            PastPrompt(
                id=draft.id,
                session=draft.session,
                tokens=self._history.tokens(prompt.tokens),
                num_prompt=draft.num_prompt,
                began_s=draft.created_s,
            )
        )

    def end(self, request_id: str, reply: Sequence[int], num_evaluated: int, whole: bool) -> None:
        """Record how far a request came."""
        self._history.end(request_id, reply, "ended" if whole else "cancelled", num_evaluated)


def plan_of(
    draft: Draft,
    found: Found | None,
    status: Status,
    token_s: float,
    followed_s: float | None = None,
    num_done: int | None = None,
) -> CachePlan:
    """The plan of a request that restores `found`.

    Args:
        token_s: seconds to evaluate one token of a prompt.
        followed_s: seconds that it waited for a request in flight to come as far as `found`.
        num_done: tokens that were evaluated before it was ended; None: all.
    """
    restored = found.position if found else 0
    num_whole = draft.num_prompt - restored
    num_evaluated = num_whole if num_done is None else min(num_done, num_whole)
    # What is lost comes first: it is what both prompts begin with.
    num_new = min(draft.nearest.num_new if draft.nearest else num_whole, num_whole)
    num_lost = min(num_whole - num_new, num_evaluated)
    num_new = num_evaluated - num_lost
    if num_lost <= _unavoidable(draft):
        num_new, num_lost = num_evaluated, 0
    cause = _cause(draft, restored, num_lost)
    if cause == "never_seen":
        num_new, num_lost = num_evaluated, 0
        cause = None if restored else cause
    plan = CachePlan(
        request=draft.id,
        session=draft.session,
        status=status,
        created=int(draft.created_s),
        prompt_tokens=draft.num_prompt,
        restored=_restored(found, followed_s),
        evaluated_tokens=num_evaluated,
        new_tokens=num_new,
        lost_tokens=num_lost,
        prompt_s=round(num_evaluated * token_s, 4),
        lost_s=round(num_lost * token_s, 4),
        cause=cause,
        summary="",
        nearest=_nearest_out(draft),
        difference=draft.difference,
        normalised=draft.normalised,
    )
    return msgspec.structs.replace(plan, summary=_summary(plan, draft))


def anthropic_miss_reason(plan: CachePlan) -> tuple[str, int] | None:
    """The type of Anthropic's `diagnostics.cache_miss_reason`, and the tokens missed; None when
    nothing was lost."""
    if plan.cause is None:
        return None
    names: dict[str, str] = {
        "system_changed": "system_changed",
        "tools_changed": "tools_changed",
        "other_model": "model_changed",
        "never_seen": "previous_message_not_found",
    }
    in_messages = plan.cause in get_args(Change) and plan.cause not in names
    fallback = "messages_changed" if in_messages else "unavailable"
    return names.get(plan.cause, fallback), plan.lost_tokens


def _unavoidable(draft: Draft) -> int:
    """What a checkpoint on the grid before the generation prompt leaves to evaluate."""
    return PAGE_TOKENS + draft.num_generation


def _cause(draft: Draft, restored: int, num_lost: int) -> Cause | None:
    if draft.nearest is None:
        return "never_seen" if restored == 0 else None
    if num_lost == 0:
        is_strange = draft.nearest.num_common < PAGE_TOKENS < draft.num_prompt
        return "never_seen" if is_strange and restored == 0 else None
    gap = draft.nearest.num_common - restored
    if gap > _unavoidable(draft) and 2 * gap >= num_lost:
        return _store_cause(draft, restored)
    return draft.difference.change if draft.difference else None


def _store_cause(draft: Draft, restored: int) -> Cause:
    """Why what both prompts begin with was not restored."""
    assert draft.nearest is not None
    past, departed = draft.nearest.past, draft.reach.departed
    if departed is not None and departed.position > restored + PAGE_TOKENS:
        return departed.cause
    if past.model:
        return "other_model"
    if past.num_evaluated < draft.nearest.num_common and past.state in ("running", "cancelled"):
        return "still_running" if past.state == "running" else "cancelled"
    return "no_checkpoint"


def _restored(found: Found | None, followed_s: float | None) -> Restored:
    if found is None:
        return Restored(0)
    return Restored(found.position, found.tier, found.reason, found.born, followed_s)


def _veiled(nearest: Nearest, difference: Difference | None) -> tuple[Nearest, Difference | None]:
    """Without what the other session is called and what it says."""
    past = msgspec.structs.replace(nearest.past, id="", session="")
    hidden = difference and msgspec.structs.replace(difference, before="")
    return msgspec.structs.replace(nearest, past=past), hidden


def _nearest_out(draft: Draft) -> NearestRequest | None:
    nearest = draft.nearest
    if nearest is None:
        return None
    past = nearest.past
    return NearestRequest(
        request=past.id if past.state != "stored" else "",
        session=past.session,
        model=past.model,
        common_tokens=nearest.num_common,
        age_s=round(max(0.0, draft.created_s - past.began_s), 3),
        state=past.state,
    )


_PLACES: dict[Tier, str] = {"device": "the device", "host": "memory", "disk": "disk"}

_SAYINGS: dict[str, str] = {
    "other_model": "they were evaluated with another model",
    "cancelled": "the earlier request was cancelled before it came so far",
    "still_running": "the earlier request is still being evaluated",
    "no_checkpoint": "no checkpoint lies nearer",
    "evicted": "their checkpoint was evicted to stay within the budget",
    "dropped": "their checkpoint was given up before it was written",
    "damaged": "their checkpoint was damaged",
    "wiped": "their checkpoint was wiped on request",
    "compaction": "the history was replaced by a shorter one",
    "template_rerendering": "the template shows the earlier reply in another way",
    "tool_call_reserialised": "the client wrote a tool call in another way",
    "client_edit": "the client changed it",
    "system_changed": "the system prompt changed",
    "tools_changed": "the tools changed",
}


def _summary(plan: CachePlan, draft: Draft) -> str:
    """The plan in one or two sentences, without text of any prompt."""
    place = f" from {_PLACES[plan.restored.tier]}" if plan.restored.tier else ""
    if plan.restored.followed_s is not None:
        place = f" from a request in flight, after {plan.restored.followed_s:.2f} s"
    said = f"{plan.restored.tokens:,} of {plan.prompt_tokens:,} tokens reused{place}."
    if plan.cause is None:
        return said
    if plan.cause == "never_seen":
        return f"{said} Nothing like it was seen before."
    where = ""
    if draft.difference is not None and plan.cause == draft.difference.change:
        where = f" from {_place(draft.difference)} on (token {draft.difference.position:,})"
    again = "" if plan.cause in ("cancelled", "still_running") else " again"
    lost = f"{plan.lost_tokens:,} evaluated{again}{where}: {_SAYINGS[plan.cause]}"
    return f"{said} {lost}."


def _place(difference: Difference) -> str:
    if difference.part == "tools":
        return f"tool {difference.tool!r}" if difference.tool else "the tools"
    if difference.message is None:
        return f"the {difference.part}"
    return f"message {difference.message} ({difference.role}, {difference.part})"
