"""The plans of the last requests, to be asked for by id, and the course of each.

Owns a bounded map, the oldest forgotten first, and how fast prompts were evaluated lately. Event
loop only.
"""

from collections import OrderedDict

from daemon.api.cache_plan import CachePlan, Draft, Status, plan_of
from daemon.checkpoint import Found
from daemon.metrics import RequestRecord

MAX_PLANS = 1024
_LATEST_SHARE = 0.2
_ID_LENGTH = 32


class RequestPlans:
    """Plans by request id; `token_s` is a running mean of seconds a token of a prompt."""

    def __init__(self, max_plans: int = MAX_PLANS) -> None:
        self._max_plans = max_plans
        self._plans: OrderedDict[str, CachePlan] = OrderedDict()
        self.token_s = 0.0

    def put(self, plan: CachePlan) -> None:
        """Keep a plan, in place of an earlier one of the same request."""
        self._plans[plan.request] = plan
        if len(self._plans) > self._max_plans:
            self._plans.popitem(last=False)

    def find(self, request_id: str) -> CachePlan | None:
        """By the id of `x-request-id`, or that of an answer, which ends with it."""
        return self._plans.get(request_id[-_ID_LENGTH:])

    def latest(self, count: int) -> list[CachePlan]:
        """The last requests, the newest first."""
        return list(reversed(self._plans.values()))[:count]

    def forget(self, session: str) -> None:
        """Forget all plans of a session."""
        for plan in list(self._plans.values()):
            if plan.session == session:
                del self._plans[plan.request]

    def measured(self, num_tokens: int, seconds: float) -> None:
        """Record how long the evaluation of some prompt tokens took."""
        if num_tokens <= 0 or seconds <= 0:
            return
        latest = seconds / num_tokens
        share = _LATEST_SHARE if self.token_s else 1.0
        self.token_s += share * (latest - self.token_s)


class PlanCourse:
    """One request's plan as more becomes known: foreseen, then restored, then measured."""

    def __init__(self, draft: Draft, plans: RequestPlans) -> None:
        self._draft = draft
        self._plans = plans
        self._found = draft.reach.found
        self._followed_s: float | None = None
        self._is_revoked = False
        self.plan = plan_of(draft, self._found, "waiting", plans.token_s)

    def revoke(self) -> None:
        """Keep it for the answer alone: nobody else may ask for it any more."""
        self._is_revoked = True

    def begin(self) -> None:
        """The engine has taken the request."""
        self._put()

    def restored(self, found: Found | None, followed_ms: float | None) -> None:
        """Evaluation goes on from a checkpoint, for which it may have waited, or from token 0."""
        self._found = found
        self._followed_s = None if followed_ms is None else round(followed_ms / 1e3, 4)
        self._renew("running", self._plans.token_s)

    def end(self, record: RequestRecord, status: Status) -> None:
        """Put in what the request really took."""
        seconds, num_evaluated = record.prompt_ms / 1e3, record.num_evaluated_tokens
        self._plans.measured(num_evaluated, seconds)
        is_measured = seconds > 0 and num_evaluated > 0
        token_s = seconds / num_evaluated if is_measured else self._plans.token_s
        self._renew(status, token_s, None if status == "ended" else num_evaluated)

    def _renew(self, status: Status, token_s: float, num_done: int | None = None) -> None:
        self.plan = plan_of(self._draft, self._found, status, token_s, self._followed_s, num_done)
        self._put()

    def _put(self) -> None:
        if not self._is_revoked:
            self._plans.put(self.plan)
