"""The hand-over from the engine thread: order, waking, time-out, overflow, a closed loop."""

import asyncio
import threading

from daemon.api.mailbox import Mailbox
from daemon.engine.requests import Finished, Started, TokenSampled


def test_all_events_arrive_in_order_from_another_thread() -> None:
    async def run() -> list[int]:
        mailbox = Mailbox(asyncio.get_running_loop(), 10_000, lambda: None)
        thread = threading.Thread(
            target=lambda: [mailbox.put(TokenSampled(i)) for i in range(5000)]
        )
        thread.start()
        tokens: list[int] = []
        while len(tokens) < 5000:
            events = await mailbox.take(5)
            assert events
            tokens += [event.token for event in events if isinstance(event, TokenSampled)]
        thread.join()
        return tokens

    assert asyncio.run(run()) == list(range(5000))


def test_nothing_comes_after_the_time_out() -> None:
    async def run() -> None:
        mailbox = Mailbox(asyncio.get_running_loop(), 8, lambda: None)
        assert await mailbox.take(0.01) == []
        mailbox.put(TokenSampled(1))
        await asyncio.sleep(0)
        assert await mailbox.take(0) == [TokenSampled(1)]

    asyncio.run(run())


def test_overflow_is_told_once_and_bounds_what_waits() -> None:
    told = []

    async def run() -> Mailbox:
        mailbox = Mailbox(asyncio.get_running_loop(), 3, lambda: told.append(1))
        for token in range(10):
            mailbox.put(TokenSampled(token))
        assert [event.token for event in await mailbox.take(1)] == [0, 1, 2]  # type: ignore[union-attr]
        return mailbox

    mailbox = asyncio.run(run())
    assert mailbox.overflowed
    assert told == [1]
    mailbox.put(TokenSampled(99))  # the loop is closed by now


def test_where_the_engine_is_shows_before_it_is_read() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        mailbox = Mailbox(loop, 1, lambda: None)
        assert mailbox.began_s is None
        mailbox.put(Started(9, 0))
        assert mailbox.began_s is not None
        assert mailbox.began_s <= loop.time()
        mailbox.put(TokenSampled(1))
        mailbox.put(Finished("length", 9, 0, (1,), 1.0, 1.0))
        assert mailbox.overflowed

    asyncio.run(run())
