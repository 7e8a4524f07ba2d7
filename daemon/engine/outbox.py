"""Events on their way to those who asked, held until the device has its next work.

So what a token sets going on other threads, text and HTTP, runs while the device computes, and not
between two of its steps. Keeps the order of events. Engine thread only.
"""

from daemon.engine.requests import Deliver, Event


class Outbox:
    """What is to be delivered, in order."""

    def __init__(self) -> None:
        self._events: list[tuple[Deliver, Event]] = []

    def through(self, deliver: Deliver) -> Deliver:
        """A `deliver` whose events wait here."""
        return lambda event: self._events.append((deliver, event))

    def empty(self) -> None:
        """Deliver everything."""
        events, self._events = self._events, []
        for deliver, event in events:
            deliver(event)
