"""The one path inside, whatever the dialect: messages → prompt → engine → deltas.

Owns a request from its decoded form to its last delta: the prompt thread, the hand-over from the
engine, cancellation, the record in metrics and log. Knows no wire format. Event loop; prompts are
built on one thread of their own, so that a long one delays no stream.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from daemon.api.after_reply import EndedReply, prepare_next, remember
from daemon.api.cache_plan import CachePlan, CachePlanner, Draft, plan_of
from daemon.api.conversation import Conversation, RawPrompt
from daemon.api.mailbox import Mailbox
from daemon.api.reply import Reply, ReplyRules, joined
from daemon.api.reply_pieces import EndReason, Outcome, Piece, PromptProgress
from daemon.api.request_plans import PlanCourse, RequestPlans
from daemon.api.service import Service
from daemon.api.session_hint import title_of
from daemon.checkpoint import Boundary
from daemon.engine.requests import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Progress,
    SamplingParams,
    Started,
    TokenSampled,
)
from daemon.errors import EngineStopped, Overloaded, PromptTooLong
from daemon.logs import log_request, log_text
from daemon.metrics import Load, RequestRecord
from daemon.text.constrainer import Thinking
from daemon.text.constraint import ReplyConstraint
from daemon.text.messages import ToolSpec
from daemon.text.prompt import Prompt
from daemon.text.reply_parser import Delta
from daemon.text.tool_calls import OPENING

T = TypeVar("T")

BAN = -1000.0
"""Added to a logit, it leaves the token no chance."""


class Generations:
    """All replies being generated. One object a daemon; `close` ends them all.

    Attributes:
        plans: what the last requests reused, and why not more.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._prompt_thread = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._live: set[Generation] = set()
        self._num_arriving = 0
        self._closed = False
        self._planner = CachePlanner(
            service.tokenizer, service.history, service.reach, service.is_shared
        )
        self.plans = RequestPlans()
        self._forgetting: list[Callable[[str], None]] = []

    async def on_prompt_thread(self, function: Callable[..., T], *args: object) -> T:
        """Run what takes long for long inputs, off the event loop and one at a time.

        Raises:
            EngineStopped: the server is shutting down.
        """
        if self._closed:
            raise EngineStopped("The server is shutting down.")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._prompt_thread, function, *args)

    async def start(self, asked: Conversation | RawPrompt, rules: ReplyRules) -> "Generation":
        """Build the prompt, plan it and queue it. The caller must `close` what it gets.

        Raises:
            InvalidRequest: the template refuses the messages, or no text has the form asked for.
            PromptTooLong: the context leaves no room for one token.
            Overloaded: too many requests wait.
            EngineStopped: no request is taken any more.
        """
        arrived_s = asyncio.get_running_loop().time()
        self._num_arriving += 1
        try:
            prompt, draft, constraint = await self.on_prompt_thread(self._begin, asked, rules)
        finally:
            self._num_arriving -= 1
        if self._closed:
            raise EngineStopped("The server is shutting down.")
        generation = Generation(self._service, prompt, draft, asked, rules, self, arrived_s)
        generation.submit(constraint)
        self._live.add(generation)
        if isinstance(asked, Conversation):
            self._service.suggest_title(asked.session, title_of(asked.messages), bool(asked.tools))
        self.soon_on_prompt_thread(self._planner.remember, draft, prompt)
        return generation

    async def count_tokens(self, conversation: Conversation) -> int:
        """The length of the prompt.

        Raises:
            InvalidRequest: the template refuses the messages.
            EngineStopped: the server is shutting down.
        """
        return len(await self.prompt_tokens(conversation))

    async def prompt_tokens(self, conversation: Conversation) -> tuple[int, ...]:
        """The prompt; raises as `count_tokens`."""
        prompt = await self.on_prompt_thread(self._build, conversation)
        return prompt.tokens

    def load(self) -> Load:
        """How many requests wait, and how many are answered."""
        num_running = sum(generation.has_begun for generation in self._live)
        return Load(self._num_arriving + len(self._live) - num_running, num_running)

    def evaluated(self) -> list[tuple[int, int, int, int]]:
        """Of each reply that the engine works on, the prompt's tokens: all, done, cached; and those
        of the reply."""
        return [generation.counts for generation in self._live if generation.is_evaluated]

    async def plan(self, asked: Conversation | RawPrompt) -> CachePlan:
        """What an answer would reuse; nothing is evaluated, and nothing remembered.

        Raises:
            InvalidRequest: the template refuses the messages.
            EngineStopped: the server is shutting down.
        """
        _, draft = await self.on_prompt_thread(self._prepare, asked)
        return plan_of(draft, draft.reach.found, "dry_run", self.plans.token_s)

    def when_forgetting(self, forget: Callable[[str], None]) -> None:
        """Have something done when a session is wiped, by its name."""
        self._forgetting.append(forget)

    def forget(self, session: str) -> None:
        """Forget what is remembered of a session's requests; encoded frames of all sessions go."""
        self.plans.forget(session)
        self._service.history.forget(session)
        self._service.prompts.forget()
        for forget in self._forgetting:
            forget(session)

    def ended(self, draft: Draft, reply: Sequence[int], num_evaluated: int, whole: bool) -> None:
        """Record how far a request came; prompt thread."""
        self._planner.end(draft.id, reply, num_evaluated, whole)

    def soon_on_prompt_thread(self, function: Callable[..., None], *args: object) -> None:
        """Run something there some time, unless the server shuts down."""
        if not self._closed:
            self._prompt_thread.submit(function, *args)

    def _begin(
        self, asked: Conversation | RawPrompt, rules: ReplyRules
    ) -> tuple[Prompt, Draft, ReplyConstraint | None]:
        prompt, draft = self._prepare(asked)
        cut = draft.difference.cut if draft.difference else None
        if cut is not None and self._service.prompts.learn_cut(cut):
            prompt = asked.prompt if isinstance(asked, RawPrompt) else self._build(asked)
        if self._service.log_prompts:
            log_text(draft.id, "prompt", self._service.tokenizer.decode(prompt.tokens))
        budget = self._service.defaults.budget_for(rules.thinking_budget)
        thinking = Thinking(prompt.thinking_open, budget)
        return prompt, draft, self._service.constrainer.constrain(rules.guide, thinking)

    def _prepare(self, asked: Conversation | RawPrompt) -> tuple[Prompt, Draft]:
        prompt = asked.prompt if isinstance(asked, RawPrompt) else self._build(asked)
        return prompt, self._planner.draft(uuid.uuid4().hex, prompt, asked.session)

    def _build(self, conversation: Conversation) -> Prompt:
        tools = (*conversation.tools, *conversation.deferred_tools)
        self._service.limits.check(len(conversation.messages), len(tools))
        options = self._service.defaults.options_for(conversation.template_options)
        return self._service.prompts.build(conversation.messages, conversation.tools, options)

    def discard(self, generation: "Generation") -> None:
        """Forget a generation that has been closed."""
        self._live.discard(generation)

    def close(self) -> None:
        """Take no more, and cancel all: their streams end with an error that says so."""
        self._closed = True
        for generation in list(self._live):
            generation.cancel()
        self._prompt_thread.shutdown(wait=False)


class Generation:
    """One reply, from its prompt to its outcome.

    Attributes:
        id: the request's id, in the engine and for the client.
        outcome: how it ended; set once `pieces` is exhausted.
    """

    def __init__(
        self,
        service: Service,
        prompt: Prompt,
        draft: Draft,
        asked: Conversation | RawPrompt,
        rules: ReplyRules,
        owner: Generations,
        arrived_s: float,
    ) -> None:
        self.id = draft.id
        self.outcome: Outcome | None = None
        self._service = service
        self._prompt = prompt
        self._draft = draft
        self._asked = asked
        self._rules = rules
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        tools: tuple[ToolSpec, ...] = ()
        if isinstance(asked, Conversation):
            tools = (*asked.tools, *asked.deferred_tools)
        self._reply = Reply(service.tokenizer, prompt, tools, rules)
        self._mailbox = Mailbox(self._loop, service.limits.max_pending_events, self.cancel)
        self._num_cached = 0
        self._num_done = 0
        self._finished: Finished | None = None
        self._finish = "cancelled"
        self._closed = False
        self._course = PlanCourse(draft, owner.plans)
        self._arrived_s, self._last_sign_s = arrived_s, self._loop.time()

    @property
    def has_begun(self) -> bool:
        """Whether its evaluation has begun."""
        return self._mailbox.began_s is not None

    @property
    def is_evaluated(self) -> bool:
        """Whether the engine works on it."""
        return self.has_begun and not self._mailbox.has_ended

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """See `Generations.evaluated`."""
        counted = (self._num_done, self._num_cached, self._reply.num_tokens)
        return self.num_prompt_tokens, *counted

    @property
    def num_prompt_tokens(self) -> int:
        """The prompt's length."""
        return len(self._prompt.tokens)

    @property
    def plan(self) -> CachePlan:
        """What it reuses; foreseen until evaluation begins, final once `pieces` is exhausted."""
        return self._course.plan

    def submit(self, constraint: ReplyConstraint | None) -> None:
        """Hand the prompt to the engine, and what may follow it."""
        context_length = self._service.engine.info.context_length
        num_prompt = len(self._prompt.tokens)
        room = context_length - num_prompt
        if room < 1:
            raise PromptTooLong(num_prompt, context_length)
        given, usual = self._rules.max_tokens, self._service.defaults.max_tokens
        wanted = usual if given is None else given
        request = GenerationRequest(
            id=self.id,
            tokens=self._prompt.tokens,
            boundaries=tuple(Boundary(*boundary) for boundary in self._prompt.boundaries),
            sampling=self._sampling(),
            max_tokens=room if wanted is None else min(wanted, room),
            stop_tokens=self._service.tokenizer.stop_tokens | self._rules.stop_tokens,
            session=self._asked.session,
            constraint=constraint,
        )
        self._service.engine.submit(request, self._mailbox.put)
        self._course.begin()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The reply as it comes; a sign of life at least every `sign_of_life_s` seconds.

        Raises:
            QwendError: the engine failed or stopped, the client reads too slowly, or it took too
                long.
        """
        while self._finished is None:
            due_s = self._last_sign_s + self._service.limits.sign_of_life_s
            wait_s = min(due_s, self._deadline_s()) - self._loop.time()
            piece = self._digest(await self._mailbox.take(wait_s))
            if piece.deltas or piece.tokens or self._loop.time() >= due_s:
                self._last_sign_s = self._loop.time()
                yield piece
            elif piece.progress is not None:
                yield piece
        await self._settle(self._finished)

    def cancel(self) -> None:
        """Stop the engine's work; does no harm when it has ended."""
        self._service.engine.cancel(self.id)

    def close(self) -> None:
        """Cancel what still runs, and record how the request ended. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._owner.discard(self)
        if self._finished is None:
            self.cancel()
        if self._service.log_prompts and self._finished is not None:
            log_text(self.id, "reply", self._service.tokenizer.decode(self._finished.tokens))
        record = self._record()
        if self.outcome is None:
            self._course.end(record, "failed" if self._finish == "failed" else "cancelled")
            self._owner.soon_on_prompt_thread(
                self._owner.ended, self._draft, (), self._num_done, False
            )
        self._service.metrics.request_ended(record)
        log_request(record)

    def _sampling(self) -> SamplingParams:
        sampling = self._rules.sampling
        if not self._rules.forbid_calls:
            return sampling
        opening = self._service.tokenizer.encode(OPENING)[0]
        bias = (*sampling.logit_bias, (opening, BAN))
        return msgspec.structs.replace(sampling, logit_bias=bias)

    def _deadline_s(self) -> float:
        """When the loop's clock says that patience ends."""
        return self._arrived_s + self._service.limits.patience_s(self.has_begun)

    def _digest(self, events: Sequence[Event]) -> Piece:
        if self._mailbox.overflowed:
            self._finish = "unread"
            raise Overloaded("The client reads too slowly; the request was ended.")
        if not events and self._loop.time() >= self._deadline_s():
            self._finish = "timeout"
            raise self._service.limits.too_late(self.has_begun)
        deltas: list[Delta] = []
        tokens: list[TokenSampled] = []
        progress = None
        for event in events:
            match event:
                case TokenSampled():
                    deltas += self._sampled(event, tokens)
                case Started():
                    self._num_cached = self._num_done = event.num_cached_tokens
                    self._course.restored(event.restored, event.followed_ms)
                    progress = self._progress()
                case Progress():
                    self._num_done = event.num_done_tokens
                    progress = self._progress() if self._rules.report_progress else progress
                case Finished():
                    deltas += self._reply.finish()
                    self._finished = event
                case Failed(error):
                    self._finish = "failed"
                    raise error
        return Piece(tuple(joined(deltas)), tuple(tokens), progress)

    def _progress(self) -> PromptProgress:
        assert self._mailbox.began_s is not None
        return PromptProgress(
            num_prompt_tokens=len(self._prompt.tokens),
            num_cached_tokens=self._num_cached,
            num_done_tokens=self._num_done,
            elapsed_ms=(self._loop.time() - self._mailbox.began_s) * 1e3,
        )

    def _sampled(self, event: TokenSampled, tokens: list[TokenSampled]) -> list[Delta]:
        if self._reply.is_cut:
            return []
        deltas = self._reply.feed(event.token)
        if event.logprobs is not None:
            tokens.append(event)
        if self._reply.is_cut:
            self.cancel()
        return deltas

    async def _settle(self, finished: Finished) -> None:
        """Decide how it ended, and remember the reply before the client can send it back."""
        reply = self._reply
        if finished.reason == "cancelled" and not reply.is_cut:
            raise EngineStopped("The request was cancelled by the server.")
        ended = self._ended(finished)
        await self._owner.on_prompt_thread(self._remember, ended, finished)
        self._owner.soon_on_prompt_thread(prepare_next, self._service, ended)
        reason: EndReason = "length" if finished.reason == "length" else "stop"
        if reason == "stop" and reply.num_calls:
            reason = "tool_calls"
        self._finish = reason
        self._course.end(self._record(), "ended")
        self.outcome = Outcome(
            reason=reason,
            stop=reply.stop,
            num_prompt_tokens=finished.num_prompt_tokens,
            num_cached_tokens=finished.num_cached_tokens,
            num_written_tokens=max(0, finished.num_kept_tokens - finished.num_cached_tokens),
            num_reply_tokens=reply.num_tokens,
            num_reasoning_tokens=reply.num_reasoning_tokens,
            prompt_ms=finished.prompt_ms,
            decode_ms=finished.decode_ms,
            plan=self.plan,
        )

    def _remember(self, ended: EndedReply, finished: Finished) -> None:
        remember(self._service, ended)
        num_evaluated = finished.num_prompt_tokens + len(finished.tokens)
        self._owner.ended(self._draft, finished.tokens, num_evaluated, True)

    def _ended(self, finished: Finished) -> EndedReply:
        reply = self._reply
        return EndedReply(
            request_id=self.id,
            asked=self._asked,
            prompt=self._prompt,
            tokens=finished.tokens[: reply.num_tokens] if reply.is_cut else finished.tokens,
            cut=reply.cut,
            is_whole=finished.reason == "stop" or reply.is_cut,
            has_form=self._rules.guide is not None and self._rules.guide.content is not None,
        )

    def _record(self) -> RequestRecord:
        finished = self._finished
        num_done = self._num_done if finished is None else finished.num_prompt_tokens
        began_s = self._mailbox.began_s
        return RequestRecord(
            id=self.id,
            model=self._service.engine.info.model_name,
            session=self._asked.session,
            num_prompt_tokens=len(self._prompt.tokens),
            num_cached_tokens=self._num_cached,
            num_evaluated_tokens=num_done - self._num_cached,
            num_generated_tokens=self._reply.num_tokens,
            prompt_ms=0.0 if finished is None else finished.prompt_ms,
            decode_ms=0.0 if finished is None else finished.decode_ms,
            finish=self._finish,
            queue_ms=None if began_s is None else (began_s - self._arrived_s) * 1e3,
            tier=self.plan.restored.tier or "",
            followed=self.plan.restored.followed_s is not None,
            num_lost_tokens=self.plan.lost_tokens,
            cause=self.plan.cause or "",
        )
