"""All replies being generated, whatever the dialect: a request comes in, a `Generation` goes out.

Owns the prompt thread, the plans and the slots, and who is being answered. Knows no wire format and
nothing of how a reply grows. Event loop; prompts are built on one thread of their own, so that a
long one delays no stream.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from daemon.api.cache_plan import CachePlan, CachePlanner, Draft, plan_of
from daemon.api.conversation import Conversation, RawPrompt
from daemon.api.generation import Generation
from daemon.api.reply import ReplyRules
from daemon.api.request_plans import RequestPlans
from daemon.api.service import Service
from daemon.api.session_hint import title_of
from daemon.api.slots import Slots
from daemon.errors import EngineStopped, PromptTooLong
from daemon.logs import log_text
from daemon.metrics import Load
from daemon.text.constrainer import Thinking
from daemon.text.constraint import ReplyConstraint
from daemon.text.prompt import Prompt

T = TypeVar("T")


class Generations:
    """All replies being generated. One object a daemon; `close` ends them all.

    Attributes:
        plans: what the last requests reused, and why not more.
        slots: the numbers of the replies that the engine works on.
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
        self.slots: Slots[Generation] = Slots()
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

    async def start(self, asked: Conversation | RawPrompt, rules: ReplyRules) -> Generation:
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

    async def plan(self, asked: Conversation | RawPrompt) -> CachePlan:
        """What an answer would reuse; nothing is evaluated, and nothing remembered.

        Raises:
            InvalidRequest: the template refuses the messages.
            PromptTooLong: the context leaves no room for one token.
            EngineStopped: the server is shutting down.
        """
        _, draft = await self.on_prompt_thread(self._prepare, asked)
        context_length = self._service.engine.info.context_length
        if draft.num_prompt >= context_length:
            raise PromptTooLong(draft.num_prompt, context_length)
        return plan_of(draft, draft.reach.found, "dry_run", self.plans.token_s)

    def when_forgetting(self, forget: Callable[[str], None]) -> None:
        """Have something done when a session is wiped, by its name."""
        self._forgetting.append(forget)

    def revoke(self, session: str) -> None:
        """Remember nothing of the requests of a session that are being answered."""
        for generation in self._live:
            if generation.session == session:
                generation.revoke()

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

    def discard(self, generation: Generation) -> None:
        """Forget a generation that has been closed."""
        self._live.discard(generation)

    def close(self) -> None:
        """Take no more, and cancel all: their streams end with an error that says so."""
        self._closed = True
        for generation in list(self._live):
            generation.cancel()
        self._prompt_thread.shutdown(wait=False)
