"""What the HTTP side is given to work with. Built once by assemble, read by every route.

Owns nothing; knows the engine by its front door and the store only as functions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from msgspec import Struct

from daemon.api.access import AccessRules
from daemon.api.cache_plan import AskReach
from daemon.checkpoint import Reach
from daemon.engine.requests import Engine, SamplingParams
from daemon.errors import InvalidRequest, Overloaded, QwendError, TimedOut, UnknownModel
from daemon.metrics import Metrics
from daemon.text.constrainer import Constrainer
from daemon.text.prompt import PromptBuilder
from daemon.text.prompt_history import PromptHistory
from daemon.text.tokenizer import Tokenizer

SuggestTitle = Callable[[str, str, bool], None]
"""Names a session that has no name; one that is not final gives way to the next."""

EngineState = Literal["loading", "ok", "stopped"]

Remember = Callable[[Sequence[tuple[str, tuple[int, ...]]]], None]
"""Keeps (frame text, sampled tokens) of replies, so that history coming back matches again."""


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds of the HTTP side.

    `max_pending_events` are the tokens that may wait for a client that does not read;
    `sign_of_life_s` the longest silence of a stream, in seconds. A request that the engine has not
    begun after `queue_timeout_s` is told to come back later; one that has not ended after
    `request_timeout_s` is ended (None: neither).
    """

    max_body_bytes: int = 64 * 2**20
    max_messages: int = 50_000
    max_tools: int = 1024
    max_pending_events: int = 16_384
    sign_of_life_s: float = 5.0
    queue_timeout_s: float | None = 600.0
    request_timeout_s: float | None = None

    def check(self, num_messages: int, num_tools: int) -> None:
        """Count a conversation.

        Raises:
            InvalidRequest: it has too many messages or tools.
        """
        for param, count, most in (
            ("messages", num_messages, self.max_messages),
            ("tools", num_tools, self.max_tools),
        ):
            if count > most:
                raise InvalidRequest(f"{param}: {count} are more than the {most} allowed.", param)

    def patience_s(self, has_begun: bool) -> float:
        """How long after its arrival a request is given up, by whether the engine has begun it."""
        waits = () if has_begun else (self.queue_timeout_s,)
        spans = [span for span in (*waits, self.request_timeout_s) if span is not None]
        return min(spans, default=math.inf)

    def too_late(self, has_begun: bool) -> QwendError:
        """What to tell a client whose request was given up."""
        if not has_begun:
            return Overloaded(f"The request waited {self.queue_timeout_s:g} s for its turn.")
        return TimedOut(f"The request took longer than {self.request_timeout_s:g} s.")


class StoredSessions(Protocol):
    """What the store can do with sessions, by id or name; it may take its time."""

    @property
    def folder(self) -> Path:
        """Where there is room for a file that is being imported."""
        ...

    def rows(self) -> object:
        """All sessions, the last used first."""
        ...

    def row(self, name: str) -> object:
        """One session."""
        ...

    def change(self, name: str, *, title: str | None, is_pinned: bool | None) -> object:
        """Rename, pin or unpin."""
        ...

    def fork(self, name: str, session: str, *, position: int | None, title: str) -> object:
        """A new session that goes on from another's checkpoint."""
        ...

    def wipe(self, name: str, timelines: Sequence[bytes]) -> object:
        """Delete a session and all that was sampled in these token ids (little-endian u32)."""
        ...

    def export(self, name: str) -> Iterator[bytes]:
        """A session as a file, piece by piece."""
        ...

    def take_in(self, path: Path, session: str | None) -> object:
        """Import an exported session."""
        ...


class ReplyDefaults(Struct, frozen=True, kw_only=True):
    """What a request does not say: its template options, and limits in tokens (None: none)."""

    template_options: Mapping[str, Any] = {}
    thinking_budget: int | None = None
    max_tokens: int | None = None

    def options_for(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Template options for a request."""
        return {**self.template_options, **asked}

    def budget_for(self, asked: int | None) -> int | None:
        """Tokens of thinking for a request."""
        return self.thinking_budget if asked is None else asked


class ModelFacts(Struct, frozen=True):
    """Of the model file, for those who ask as they would ask llama-server."""

    path: str = ""
    chat_template: str = ""


class Service(Struct, frozen=True, kw_only=True):
    """One served model and all that a request to it needs.

    `sampling` are the model's own recommended values, which a request's override one by one.
    `aliases` are further names that the model answers to. `fingerprint` names build and weights
    in answers, `created` is when the model was loaded, in Unix seconds. `history` are the prompts
    that new ones are compared with, `reach` says what the store has of one, `sessions` are its
    sessions as objects, and `suggest_title` names one by its first question. `cache_stats` gives
    the store's own figures; it must be quick and thread-safe. `log_prompts` writes all text that
    comes and goes into the log. `works_ahead`: what a next request will begin with is evaluated
    before it comes.
    """

    engine: Engine
    engine_state: Callable[[], EngineState]
    tokenizer: Tokenizer
    prompts: PromptBuilder
    constrainer: Constrainer
    remember: Remember
    cache_stats: Callable[[], Mapping[str, Any]]
    metrics: Metrics
    history: PromptHistory
    sessions: StoredSessions | None = None
    suggest_title: SuggestTitle = lambda session, title, is_final: None
    reach: AskReach = lambda _: Reach(None)
    sampling: SamplingParams = SamplingParams()
    defaults: ReplyDefaults = ReplyDefaults()
    limits: Limits = Limits()
    access: AccessRules = AccessRules()
    facts: ModelFacts = ModelFacts()
    log_prompts: bool = False
    works_ahead: bool = False
    aliases: tuple[str, ...] = ()
    fingerprint: str = "qwend"
    version: str = "0"
    created: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether several people ask, each with a key of their own."""
        return len(self.access.keys) > 1

    @property
    def model_name(self) -> str:
        """The name that answers give."""
        return self.engine.info.model_name

    def check_model(self, name: str | None) -> None:
        """Accept the model's name, an alias, or no name at all.

        Raises:
            UnknownModel: any other name.
        """
        known = (self.model_name, *self.aliases)
        if name and name.casefold() not in map(str.casefold, known):
            raise UnknownModel(
                f"The model {name!r} does not exist here. This server serves {', '.join(known)}."
            )
