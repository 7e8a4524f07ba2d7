"""How a client asks for more or less thinking, under the names of several servers.

Owns the names, and what an effort means in tokens. Pure; runs on the prompt thread.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from daemon.api.parameters import doc
from daemon.api.structured_output import GuidedFields

EFFORT_TOKENS = {"low": 1024, "medium": 8192}
"""Tokens of thinking; other efforts set no limit."""

NO_THINKING = ("none", "minimal", "off")

Budget = Annotated[int, Meta(ge=-1)]
EFFORT = doc(
    "`none` and `minimal` switch thinking off, `low` ends it after 1,024 tokens, `medium` after "
    "8,192, others not; given to the template too"
)
BUDGET = doc("tokens after which thinking is led to its end; 0 switches it off, -1 is no limit")
ALIAS = doc("another name of thinking_budget")


class ReasoningOptions(Struct):
    """OpenRouter's object, and that of OpenAI's Responses; `summary` has no effect."""

    effort: str | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None
    summary: str | None = None


class ThinkingOptions(Struct):
    """Anthropic's object, which others took over."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] = "enabled"
    budget_tokens: Budget | None = None


class ReasoningFields(GuidedFields, kw_only=True):
    """Part of a body."""

    reasoning_effort: Annotated[str | None, EFFORT] = None
    enable_thinking: Annotated[bool | None, doc("overrides the effort")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, doc("for the template; wins")] = None
    thinking_budget: Annotated[Budget | None, BUDGET] = None
    thinking_budget_tokens: Annotated[Budget | None, ALIAS] = None
    thinking_token_budget: Annotated[Budget | None, ALIAS] = None
    reasoning_budget: Annotated[Budget | None, ALIAS] = None
    reasoning: Annotated[ReasoningOptions | None, doc("effort, max_tokens, enabled")] = None
    thinking: Annotated[ThinkingOptions | None, doc("type and budget_tokens")] = None


class ThinkingWish(Struct, frozen=True):
    """What it comes to: variables for the template, and tokens (None: no limit)."""

    template_options: dict[str, Any]
    max_tokens: int | None


def thinking_of(fields: ReasoningFields) -> ThinkingWish:
    """An effort, overridden by a switch, overridden by `chat_template_kwargs`; a budget of its own
    overrides the effort's."""
    reasoning = fields.reasoning or ReasoningOptions()
    thinking = fields.thinking or ThinkingOptions("auto")
    effort = fields.reasoning_effort or reasoning.effort
    budgets = (
        fields.thinking_budget,
        fields.thinking_budget_tokens,
        fields.thinking_token_budget,
        fields.reasoning_budget,
        reasoning.max_tokens,
        thinking.budget_tokens,
    )
    budget = next((given for given in budgets if given is not None), None)
    switches = (fields.enable_thinking, reasoning.enabled, _switch(thinking))
    switch = next((given for given in switches if given is not None), None)
    wish = wish_of(effort, budget, switch)
    return ThinkingWish(
        wish.template_options | (fields.chat_template_kwargs or {}), wish.max_tokens
    )


def wish_of(effort: str | None, budget: int | None, switch: bool | None) -> ThinkingWish:
    """For any dialect. `switch` turns thinking on or off, None leaves it to the others."""
    options: dict[str, Any] = {}
    if effort in NO_THINKING or budget == 0:
        options["enable_thinking"] = False
    elif effort is not None:
        options["reasoning_effort"] = effort
    if switch is not None:
        options["enable_thinking"] = switch
    limit = EFFORT_TOKENS.get(effort or "") if budget is None else budget
    return ThinkingWish(options, limit if limit and limit > 0 else None)


def _switch(thinking: ThinkingOptions) -> bool | None:
    return {"enabled": True, "disabled": False}.get(thinking.type)
