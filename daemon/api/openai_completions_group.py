"""Several generations that answer one request, as one source of pieces.

Owns their merging and their common end. Knows no wire format. Event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import Struct

from daemon.api.cache_plan import CachePlan
from daemon.api.generation import Generation
from daemon.api.reply_pieces import Outcome, Piece


class ChoicePiece(Struct, frozen=True):
    """What is new in one of the replies."""

    index: int
    piece: Piece


class CompletionGroup:
    """Replies in order of their prompts.

    Attributes:
        outcome: how each ended; set once `pieces` is exhausted.
    """

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.outcome: tuple[Outcome, ...] | None = None
        self._generations = tuple(generations)

    @property
    def id(self) -> str:
        """The first one's."""
        return self._generations[0].id

    @property
    def plan(self) -> CachePlan:
        """The first one's."""
        return self._generations[0].plan

    async def pieces(self) -> AsyncGenerator[ChoicePiece, None]:
        """Those of all replies, as they come.

        Raises:
            QwendError: one of them failed.
        """
        queue: asyncio.Queue[ChoicePiece | Exception | None] = asyncio.Queue(1)
        tasks = [
            asyncio.create_task(_pump(index, generation, queue))
            for index, generation in enumerate(self._generations)
        ]
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.outcome = tuple(g.outcome for g in self._generations if g.outcome is not None)

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        for generation in self._generations:
            generation.close()


async def _pump(
    index: int, generation: Generation, queue: "asyncio.Queue[ChoicePiece | Exception | None]"
) -> None:
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                await queue.put(ChoicePiece(index, piece))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
