"""A tool that comes again with its keys in another order is shown as it was first.

Some agents shuffle the keys of their tools' schemas from one run to the next. It means nothing,
and would make all of a prompt another. Owns the first spellings, bounded, the least recently used
out first. Knows nothing of templates or tokens. Locked; any thread.
"""

from collections import OrderedDict
from threading import Lock

import msgspec

from daemon.text.messages import ToolSpec

MAX_TOOLS = 4096


class ToolSpellings:
    """The first spellings of the last `max_tools` tools."""

    def __init__(self, max_tools: int = MAX_TOOLS) -> None:
        self._max_tools = max_tools
        self._tools: OrderedDict[bytes, ToolSpec] = OrderedDict()
        self._lock = Lock()

    def first(self, tool: ToolSpec) -> ToolSpec:
        """The tool as it was written when it came first."""
        key = msgspec.json.encode(tool.definition, order="sorted")
        with self._lock:
            first = self._tools.setdefault(key, tool)
            self._tools.move_to_end(key)
            if len(self._tools) > self._max_tools:
                self._tools.popitem(last=False)
        return msgspec.structs.replace(
            tool, definition=first.definition, parameters=first.parameters
        )
