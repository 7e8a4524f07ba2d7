"""What is done when a reply has ended: it is remembered, and the next request's beginning prepared.

Owns the work ahead: the conversation as its next request will show it, given to the engine as idle
work. Knows no dialect. Prompt thread.
"""

from contextlib import suppress

from msgspec import Struct

from daemon.api.conversation import Conversation, RawPrompt
from daemon.api.service import Service
from daemon.checkpoint import Boundary
from daemon.engine.requests import Event, GenerationRequest
from daemon.errors import EngineStopped, InvalidRequest
from daemon.text.messages import ToolSpec
from daemon.text.next_prompt import Beginning, next_beginning
from daemon.text.prompt import Prompt
from daemon.text.replay import Cut, shown_tokens
from daemon.text.reply_message import read_reply


class EndedReply(Struct, frozen=True, kw_only=True):
    """A reply and what it answers.

    `tokens` are the sampled ones, up to the one at whose `cut` it was ended, if it was. One that
    `is_whole` did not run into a limit. `has_form`: its text had to be JSON, or the like.
    """

    request_id: str
    asked: Conversation | RawPrompt
    prompt: Prompt
    tokens: tuple[int, ...]
    cut: Cut | None
    is_whole: bool
    has_form: bool

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """What could be called."""
        asked = self.asked
        return (*asked.tools, *asked.deferred_tools) if isinstance(asked, Conversation) else ()


def remember(service: Service, ended: EndedReply) -> None:
    """Keep the tokens of a reply, for when it comes back as text."""
    shown = shown_tokens(service.tokenizer, ended.tokens, ended.cut)
    if ended.is_whole and shown:
        service.remember(service.prompts.replay_entries(ended.prompt, shown, ended.tools))


def prepare_next(service: Service, ended: EndedReply) -> None:
    """Have the engine evaluate, while it is idle, what the next request will begin with.

    Nobody waits for it: where nothing can be prepared, nothing is. Replies that must have a form
    answer side requests, which nothing follows.
    """
    if not (service.works_ahead and ended.is_whole and isinstance(ended.asked, Conversation)):
        return
    if ended.has_form:
        return
    with suppress(InvalidRequest, EngineStopped):
        beginning = _beginning(service, ended, ended.asked)
        if len(beginning.tokens) < service.engine.info.context_length:
            service.engine.submit(_idle_request(ended, ended.asked, beginning), _ignore)


def _beginning(service: Service, ended: EndedReply, asked: Conversation) -> Beginning:
    text = service.tokenizer.decode(shown_tokens(service.tokenizer, ended.tokens, ended.cut))
    reply = read_reply(text, ended.tools, thinking_open=ended.prompt.thinking_open)
    options = service.defaults.options_for(asked.template_options)
    return next_beginning(service.prompts, asked.messages, asked.tools, options, reply)


def _idle_request(
    ended: EndedReply, asked: Conversation, beginning: Beginning
) -> GenerationRequest:
    return GenerationRequest(
        id=f"{ended.request_id}-next",
        tokens=beginning.tokens,
        boundaries=tuple(Boundary(*boundary) for boundary in beginning.boundaries),
        max_tokens=0,
        session=asked.session,
        priority="next",
    )


def _ignore(_: Event) -> None:
    """Nobody waits for the events of idle work."""
