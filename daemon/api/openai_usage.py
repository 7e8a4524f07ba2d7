"""What a reply cost, as OpenAI's chat and completions dialects and llama-server's clients read it.

Owns the Structs of `usage`, `timings` and `prompt_progress`. Pure; event loop.
"""

from collections.abc import Sequence

from msgspec import Struct

from daemon.api.reply_pieces import Outcome, PromptProgress


class PromptDetails(Struct):
    """Of the prompt, `cached_tokens` were not evaluated again; `cache_write_tokens` were, and are
    in the store from now on."""

    cached_tokens: int
    cache_write_tokens: int


class CompletionDetails(Struct):
    """`reasoning_tokens` of the reply came before its thinking was closed."""

    reasoning_tokens: int


class Usage(Struct):
    """Tokens; the cached ones are among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Timings(Struct):
    """llama-server's figures: tokens cached, evaluated and sampled, and the time they took."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class ProgressOut(Struct):
    """llama-server's progress of a prompt, in tokens; `cache` are among the `processed`."""

    total: int
    cache: int
    processed: int
    time_ms: float


def usage_of(outcome: Outcome) -> Usage:
    """The token counts of a reply."""
    return Usage(
        outcome.num_prompt_tokens,
        outcome.num_reply_tokens,
        outcome.num_prompt_tokens + outcome.num_reply_tokens,
        PromptDetails(outcome.num_cached_tokens, outcome.num_written_tokens),
        CompletionDetails(outcome.num_reasoning_tokens),
    )


def usage_sum(outcomes: Sequence[Outcome]) -> Usage:
    """The token counts of several replies together."""
    parts = [usage_of(outcome) for outcome in outcomes]
    return Usage(
        sum(part.prompt_tokens for part in parts),
        sum(part.completion_tokens for part in parts),
        sum(part.total_tokens for part in parts),
        PromptDetails(
            sum(part.prompt_tokens_details.cached_tokens for part in parts),
            sum(part.prompt_tokens_details.cache_write_tokens for part in parts),
        ),
        CompletionDetails(sum(part.completion_tokens_details.reasoning_tokens for part in parts)),
    )


def timings_of(outcome: Outcome) -> Timings:
    """The times of a reply."""
    num_evaluated = outcome.num_prompt_tokens - outcome.num_cached_tokens
    num_replied = outcome.num_reply_tokens
    return Timings(
        outcome.num_cached_tokens,
        num_evaluated,
        *_speeds(num_evaluated, outcome.prompt_ms),
        num_replied,
        *_speeds(num_replied, outcome.decode_ms),
    )


def progress_out(progress: PromptProgress) -> ProgressOut:
    """How far a prompt is."""
    return ProgressOut(
        progress.num_prompt_tokens,
        progress.num_cached_tokens,
        progress.num_done_tokens,
        round(progress.elapsed_ms, 3),
    )


def _speeds(num_tokens: int, elapsed_ms: float) -> tuple[float, float, float]:
    """Milliseconds in all, a token, and tokens a second; 0 where there is nothing to divide."""
    per_token_ms = elapsed_ms / num_tokens if num_tokens else 0.0
    per_second = num_tokens / elapsed_ms * 1e3 if elapsed_ms else 0.0
    return round(elapsed_ms, 3), round(per_token_ms, 4), round(per_second, 3)
