"""One reply, whatever the dialect: from its prompt, by the engine, to its last delta and outcome.

Owns the hand-over to the engine and from it, patience, cancellation, the record in metrics and log.
Knows no wire format and no other reply. Event loop; `_receive` runs on the engine thread.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from daemon.api.after_reply import EndedReply, prepare_next, remember
from daemon.api.cache_plan import CachePlan, Draft
from daemon.api.conversation import Conversation, RawPrompt
from daemon.api.mailbox import Mailbox
from daemon.api.reply import Reply, ReplyRules, joined
from daemon.api.reply_pieces import EndReason, Outcome, Piece, PromptProgress
from daemon.api.request_plans import PlanCourse, RequestPlans
from daemon.api.service import Service
from daemon.api.slots import Slots
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
from daemon.metrics import RequestRecord
from daemon.text.constraint import ReplyConstraint
from daemon.text.messages import ToolSpec
from daemon.text.prompt import Prompt
from daemon.text.reply_parser import Delta
from daemon.text.tool_calls import OPENING

T = TypeVar("T")

BAN = -1000.0
"""Added to a logit, it leaves the token no chance."""


class Owner(Protocol):
    """What a generation needs of those who keep all of them; see `Generations`."""

    plans: RequestPlans

    @property
    def slots(self) -> "Slots[Generation]":
        """The numbers of the replies that the engine works on."""

    async def on_prompt_thread(self, function: Callable[..., T], *args: object) -> T:
        """Run what takes long for long inputs."""

    def soon_on_prompt_thread(self, function: Callable[..., None], *args: object) -> None:
        """Run something there some time."""

    def ended(self, draft: Draft, reply: Sequence[int], num_evaluated: int, whole: bool) -> None:
        """Record how far a request came; prompt thread."""

    def discard(self, generation: "Generation") -> None:
        """Forget a generation that has been closed."""


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
        owner: Owner,
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
        self.is_revoked = False
        self._course = PlanCourse(draft, owner.plans)
        self._arrived_s, self._last_sign_s = arrived_s, self._loop.time()

    @property
    def has_begun(self) -> bool:
        """Whether its evaluation has begun."""
        return self._mailbox.began_s is not None

    @property
    def session(self) -> str:
        """Whose request it is."""
        return self._asked.session

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """The prompt's tokens: all, done, cached; and those of the reply."""
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
        self._service.engine.submit(request, self._receive)
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

    def revoke(self) -> None:
        """Remember nothing of it when it has ended: its session is wiped."""
        self.is_revoked = True
        self._course.revoke()

    def close(self) -> None:
        """Cancel what still runs, and record how the request ended. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._owner.discard(self)
        self._owner.slots.release(self)
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

    def _receive(self, event: Event) -> None:
        """Take an event on the engine thread; the slot is held from the first to the last."""
        match event:
            case Started():
                self._owner.slots.take(self)
            case Finished() | Failed():
                self._owner.slots.release(self)
        self._mailbox.put(event)

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
        if not self.is_revoked:
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
            num_lost_tokens=min(self.plan.lost_tokens, num_done - self._num_cached),
            cause=self.plan.cause or "",
        )
