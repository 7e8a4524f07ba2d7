"""The sampling parameters that all OpenAI dialects share, and their translation.

Owns their ranges and names. Pure; runs on the prompt thread.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from daemon.api.parameters import doc
from daemon.engine.requests import SamplingParams
from daemon.errors import InvalidRequest

Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(gt=0, le=10)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Bias = dict[str, Annotated[float, Meta(ge=-100, le=100)]]


class SamplingFields(Struct, kw_only=True):
    """Part of a body. Fields that are None take the model's own recommended value."""

    temperature: Annotated[Temperature | None, doc("0 to 2; 0 is greedy")] = None
    top_p: Annotated[Share | None, doc("0 to 1")] = None
    top_k: Annotated[TopK | None, doc("0 and -1 switch it off")] = None
    min_p: Annotated[Share | None, doc("0 to 1")] = None
    repetition_penalty: Annotated[Repetition | None, doc("above 0, to 10")] = None
    repeat_penalty: Annotated[Repetition | None, doc("another name of repetition_penalty")] = None
    presence_penalty: Annotated[Penalty | None, doc("-2 to 2")] = None
    frequency_penalty: Annotated[Penalty | None, doc("-2 to 2")] = None
    seed: Annotated[Seed | None, doc("the same seed and prompt give the same reply")] = None
    logit_bias: Annotated[Bias | None, doc("token id → -100 to 100, added to its logit")] = None


def sampling_of(
    fields: SamplingFields, defaults: SamplingParams, vocab_size: int, logprobs: int | None = None
) -> SamplingParams:
    """What the client asks for, over the model's own values.

    Args:
        logprobs: alternatives to report with every token; None reports nothing.

    Raises:
        InvalidRequest: `logit_bias` names no token.
    """
    changes: dict[str, Any] = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
        )
        if (value := getattr(fields, name)) is not None
    }
    penalty = fields.repetition_penalty or fields.repeat_penalty
    if penalty is not None:
        changes["repetition_penalty"] = penalty
    if fields.top_k is not None:
        changes["top_k"] = max(0, fields.top_k)
    if fields.seed is not None:
        changes["seed"] = fields.seed % 2**63
    if fields.logit_bias:
        changes["logit_bias"] = _logit_bias(fields.logit_bias, vocab_size)
    return msgspec.structs.replace(defaults, **changes, logprobs=logprobs)


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: {key!r} is not a token id below {vocab_size}.", "logit_bias"
            )
    return tuple((int(key), value) for key, value in bias.items())
