"""`qwend generate`: one answer on the terminal, by the same path as a request, without HTTP."""

import asyncio
from collections.abc import Callable

from daemon.api.conversation import Conversation
from daemon.api.generations import Generations
from daemon.api.reply import ReplyRules
from daemon.api.service import Service
from daemon.engine.requests import SamplingParams
from daemon.text.messages import Message
from daemon.text.reply_parser import ContentDelta, ReasoningDelta

Write = Callable[[str], None]


def generate(
    service: Service,
    prompt: str,
    sampling: SamplingParams,
    max_tokens: int | None,
    *,
    thinking: bool,
    write_content: Write,
    write_reasoning: Write,
) -> None:
    """Answer one user message, writing content and reasoning as they come.

    Raises:
        QwendError: the prompt is too long, or the engine failed.
    """
    conversation = Conversation(
        messages=(Message(role="user", content=prompt),),
        template_options={"enable_thinking": thinking},
    )
    rules = ReplyRules(sampling=sampling, max_tokens=max_tokens)
    asyncio.run(_stream(service, conversation, rules, write_content, write_reasoning))


async def _stream(
    service: Service,
    conversation: Conversation,
    rules: ReplyRules,
    write_content: Write,
    write_reasoning: Write,
) -> None:
    generations = Generations(service)
    try:
        generation = await generations.start(conversation, rules)
        try:
            async for piece in generation.pieces():
                for delta in piece.deltas:
                    match delta:
                        case ReasoningDelta(text):
                            write_reasoning(text)
                        case ContentDelta(text):
                            write_content(text)
        finally:
            generation.close()
    finally:
        generations.close()
