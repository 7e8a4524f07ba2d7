"""Tools in the order that shares the longest beginning with what was rendered before.

Templates write tools first, so that a sub-agent with some of its parent's tools, in another order,
shares nothing with it. Owns a bounded memory of orders, the least recently used going first; knows
nothing of tokens. Locked; any thread.
"""

from collections import OrderedDict
from collections.abc import Container, Sequence
from threading import Lock

import msgspec

from daemon.text.messages import ToolSpec

MAX_ORDERS = 64


class ToolOrder:
    """Remembers at most `MAX_ORDERS` lists of tools."""

    def __init__(self) -> None:
        self._orders: OrderedDict[tuple[bytes, ...], None] = OrderedDict()
        self._lock = Lock()

    def arrange(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        """The same tools; those that an earlier list begins with first, in its order."""
        by_definition = {msgspec.json.encode(tool.definition): tool for tool in tools}
        if len(by_definition) < len(tools):
            return tuple(tools)
        with self._lock:
            shared = max(
                (_beginning(order, by_definition.keys()) for order in self._orders),
                key=lambda names: sum(map(len, names)),
                default=(),
            )
            others = (key for key in by_definition if key not in shared)
            arranged = (*shared, *others)
            self._remember(arranged)
        return tuple(by_definition[key] for key in arranged)

    def _remember(self, order: tuple[bytes, ...]) -> None:
        if order:
            self._orders[order] = None
            self._orders.move_to_end(order)
        if len(self._orders) > MAX_ORDERS:
            self._orders.popitem(last=False)


def _beginning(order: Sequence[bytes], present: Container[bytes]) -> tuple[bytes, ...]:
    shared = []
    for key in order:
        if key not in present:
            break
        shared.append(key)
    return tuple(shared)
