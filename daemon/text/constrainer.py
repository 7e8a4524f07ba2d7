"""Makes the constraints of replies, for one model's vocabulary.

Owns the grammar library's view of the vocabulary, the grammars that are ready, and the threads on
which masks are computed. Safe on any thread.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from msgspec import Struct

from daemon.errors import InvalidRequest, UnsupportedModel
from daemon.text.constraint import (
    Body,
    CallWatch,
    GrammarMask,
    Mask,
    MaskThreads,
    ReplyConstraint,
    Thought,
    mask_without,
    reason_of,
)
from daemon.text.reply_grammar import Guide, grammar_of, one_call
from daemon.text.reply_parser import THINK_END
from daemon.text.tokenizer import Tokenizer
from daemon.text.tool_calls import CLOSING, OPENING

AFTER_THINKING = "\n\n"
"""What the template writes between `</think>` and the answer."""

OUT_OF_THOUGHT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{THINK_END}"
)
"""How thinking is ended early: the words that Qwen's documentation gives for a thinking budget."""

NUM_THREADS = 2
MAX_GRAMMAR_CHARACTERS = 2**21
MAX_READY = 64
"""Grammars kept ready, since an agent sends the same tools again and again."""


class Thinking(Struct, frozen=True):
    """Whether a reply begins inside `<think>`, and how many tokens it may think, if limited."""

    is_open: bool
    max_tokens: int | None = None


class Constrainer:
    """One object a model; `close` it at the end.

    The library needs a second or two for a large vocabulary, which it takes in the background.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = MaskThreads(NUM_THREADS)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._library: Future[LLTokenizer] = self._loader.submit(_library_tokenizer, tokenizer)
        self._text_mask = mask_without(tokenizer.vocab_size, tokenizer.control_tokens.values())
        self._ready: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._tags = _id_of(tokenizer, OPENING), _id_of(tokenizer, CLOSING)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def constrain(self, guide: Guide | None, thinking: Thinking) -> ReplyConstraint | None:
        """The constraint of one reply; None where everything is allowed throughout.

        Raises:
            InvalidRequest: a schema or a grammar that cannot be fulfilled; names the parameter.
        """
        body = None if guide is None else self._body(guide, thinking)
        thought = self._thought(thinking, is_guided=body is not None)
        return ReplyConstraint(thought, body) if thought or body else None

    def _thought(self, thinking: Thinking, is_guided: bool) -> Thought | None:
        if not thinking.is_open or not (is_guided or thinking.max_tokens is not None):
            return None
        way_out = self._tokenizer.encode(OUT_OF_THOUGHT)
        mask = self._text_mask if is_guided else None
        return Thought(thinking.max_tokens, way_out, mask, self._tokenizer.vocab_size)

    def _body(self, guide: Guide, thinking: Thinking) -> Body | None:
        after = AFTER_THINKING if thinking.is_open else ""
        if guide.content is not None or guide.calls == "required":
            matcher = self._compiled(
                guide, lambda g, loose: grammar_of(g, self._tags, loose, after)
            )
            mask = self._mask(matcher)
            mask.begin()
            return mask
        if guide.calls == "free":
            return None
        matcher = self._compiled(guide, lambda g, loose: one_call(g.tools, self._tags, loose))
        return CallWatch(
            (self._tags[0], OPENING),
            lambda: self._mask(matcher.deep_copy()),
            self._tokenizer.token_bytes,
            self._completions,
        )

    def _mask(self, matcher: LLMatcher) -> GrammarMask:
        return GrammarMask(matcher, self._threads, self._tokenizer.vocab_size)

    @cached_property
    def _completions(self) -> dict[int, Mask]:
        """By letters of the tag that are there: all tokens but those that would complete it."""
        size, spell = self._tokenizer.vocab_size, self._tokenizer.token_bytes
        rests = {length: OPENING[length:].encode() for length in range(1, len(OPENING))}
        first_letters = {rest[:1] for rest in rests.values()}
        tokens = [
            t for t in range(self._tokenizer.num_real_tokens) if spell(t)[:1] in first_letters
        ]
        return {
            length: mask_without(size, (t for t in tokens if spell(t).startswith(rest)))
            for length, rest in rests.items()
        }

    def _compiled(self, guide: Guide, write: "Write") -> LLMatcher:
        """The grammar of `guide`, ready; a fault in it is searched for, to name it.

        A tool that is not strict promises nothing: where no grammar can express its parameters,
        they are left free.
        """
        try:
            return self._compile(lambda: write(guide, frozenset()))
        except InvalidRequest as error:
            if guide.content is not None and (guide.calls == "free" or not guide.tools):
                raise _named(error, guide.content.param) from error
            loose = self._check_parts(guide)
            return self._compile(lambda: write(guide, loose))

    def _check_parts(self, guide: Guide) -> frozenset[str]:
        """Tools that no grammar can express."""
        if guide.content is not None and guide.calls != "required":
            content = Guide(content=guide.content)
            try:
                self._compile(lambda: grammar_of(content, self._tags, frozenset(), ""))
            except InvalidRequest as error:
                raise _named(error, guide.content.param) from error
        loose = set()
        for index, tool in enumerate(guide.tools):
            try:
                self._compile(lambda: one_call((tool,), self._tags, frozenset()))  # noqa: B023
            except InvalidRequest as error:
                if tool.strict:
                    raise _named(error, f"tools[{index}].function.parameters") from error
                loose.add(tool.name)
        return frozenset(loose)

    def _compile(self, write: Callable[[], str]) -> LLMatcher:
        """A matcher at the start of a grammar.

        Raises:
            InvalidRequest: the library refuses it, or no text at all fulfils it.
        """
        grammar = write()
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(f"it makes a grammar of {len(grammar)} characters, too many")
        with self._lock:
            if ready := self._ready.get(grammar):
                self._ready.move_to_end(grammar)
                return ready.deep_copy()
        matcher = LLMatcher(self._library.result(), grammar, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(reason_of(matcher))
        with self._lock:
            self._ready[grammar] = matcher
            while len(self._ready) > MAX_READY:
                self._ready.popitem(last=False)
        return matcher.deep_copy()


Write = Callable[[Guide, frozenset[str]], str]
"""Writes a guide's grammar, with the parameters of the named tools left free."""


class _Vocabulary(TokenizerWrapper):
    """The tokens as the library sees them. A control token is no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_tokenizer_wrapper = True
        self.eos_token_id = min(tokenizer.stop_tokens)
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.control_tokens.values())
        self.tokens = [
            tokenizer.token_bytes(token) if token < tokenizer.num_real_tokens else b""
            for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        """Encode what a grammar forces."""
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(decoded, special=False)


def _library_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    ends = sorted(tokenizer.stop_tokens)
    return LLTokenizer(_Vocabulary(tokenizer), n_vocab=tokenizer.vocab_size, eos_token=ends)


def _id_of(tokenizer: Tokenizer, tag: str) -> int:
    """A tag's one token.

    Raises:
        UnsupportedModel: it has several, so the model was trained on another format.
    """
    tokens = tokenizer.encode(tag)
    if len(tokens) != 1:
        raise UnsupportedModel(f"The vocabulary has no token {tag}.")
    return tokens[0]


def _named(error: InvalidRequest, param: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {' '.join(str(error).split())}.", param)
