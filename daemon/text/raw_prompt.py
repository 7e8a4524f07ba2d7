"""Prompts without messages: text or token ids to go on from, and code with a gap to fill.

Owns the order of a fill-in-the-middle prompt. Knows nothing of templates. Pure; any thread.
"""

from collections.abc import Sequence

from daemon.errors import InvalidRequest
from daemon.text.prompt import Prompt
from daemon.text.tokenizer import Tokenizer

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
GAP_ENDS = (PREFIX, SUFFIX, MIDDLE, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""Tokens with which models end what they fill in, besides those that end a reply."""


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """Text as it is; control tokens that it spells take effect."""
    return token_prompt(tokenizer, tokenizer.encode(text))


def token_prompt(tokenizer: Tokenizer, tokens: Sequence[int]) -> Prompt:
    """Token ids as they are.

    Raises:
        InvalidRequest: there is none, or one is no token of this model.
    """
    if not tokens:
        raise InvalidRequest("prompt: there must be at least one token.", "prompt")
    for token in tokens:
        if not 0 <= token < tokenizer.num_real_tokens:
            raise InvalidRequest(f"prompt: {token} is not a token of this model.", "prompt")
    return Prompt(
        tokens=tuple(tokens),
        boundaries=((len(tokens), "prompt"),),
        generation=(),
        thinking_open=False,
    )


def gap_prompt(tokenizer: Tokenizer, before: str, after: str) -> Prompt:
    """Code with a gap between `before` and `after`, whose text is the reply.

    Raises:
        InvalidRequest: the model was not trained to fill gaps.
    """
    missing = [mark for mark in (PREFIX, SUFFIX, MIDDLE) if mark not in _marks(tokenizer)]
    if missing:
        raise InvalidRequest(f"suffix: this model has no token {missing[0]}.", "suffix")
    tokens: list[int] = []
    for mark, text in ((PREFIX, before), (SUFFIX, after), (MIDDLE, "")):
        tokens += [_marks(tokenizer)[mark], *tokenizer.encode(text, special=False)]
    return token_prompt(tokenizer, tokens)


def gap_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that end what is filled in."""
    marks = _marks(tokenizer)
    return frozenset(marks[name] for name in GAP_ENDS if name in marks)


def _marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Some files declare the marks as control tokens, others as user-defined ones."""
    found = {name: tokenizer.encode(name) for name in GAP_ENDS}
    return {name: tokens[0] for name, tokens in found.items() if len(tokens) == 1}
