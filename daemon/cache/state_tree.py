"""Which states follow one another along a prompt: for each, the nearest before it, and those after.

Owns that order, by prefix hash: how a state was born and which run made its pages do not matter,
since any of them serves a prompt that begins so. Reads the tree of pages. Not thread-safe.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from daemon.cache.records import HASH_BYTES, NO_PARENT


class PageLink(Protocol):
    """A page's place: the key of the page before it, and its number, the first page's being 1."""

    parent: bytes
    depth: int


class StateNode:
    """A prefix with states: pages (keys) that they end on, and its neighbours."""

    __slots__ = ("after", "before", "depth", "hash", "tips")

    def __init__(self, tip: bytes, depth: int, before: "StateNode | None") -> None:
        self.hash = tip[:HASH_BYTES]
        self.depth = depth
        self.tips = [tip]
        self.before = before
        self.after: set[StateNode] = set()


class StateTree:
    """The prefixes that have states. `pages` must hold the pages of every state in it."""

    def __init__(self, pages: Mapping[bytes, PageLink]) -> None:
        self._pages = pages
        self._nodes: dict[bytes, StateNode] = {}
        self._first: set[StateNode] = set()

    def node(self, hash: bytes) -> StateNode:
        """The node of a prefix that has a state."""
        return self._nodes[hash]

    def add(self, tip: bytes, is_passed: bool) -> StateNode:
        """A state ends on page `tip`; `is_passed` unless no page follows on any of that prefix."""
        node = self._nodes.get(tip[:HASH_BYTES])
        if node is not None:
            node.tips.append(tip)
            return node
        node = StateNode(tip, self._pages[tip].depth, self._nearest(self._pages[tip].parent))
        siblings = node.before.after if node.before else self._first
        if is_passed:
            node.after = {s for s in siblings if s.depth > node.depth and self._passes(s, node)}
            siblings -= node.after
            for follower in node.after:
                follower.before = node
        siblings.add(node)
        self._nodes[node.hash] = node
        return node

    def remove(self, tip: bytes) -> StateNode:
        """The state that ends on page `tip` goes; returns the node, which may have gone too."""
        node = self._nodes[tip[:HASH_BYTES]]
        node.tips.remove(tip)
        if node.tips:
            return node
        del self._nodes[node.hash]
        siblings = node.before.after if node.before else self._first
        siblings.remove(node)
        siblings |= node.after
        for follower in node.after:
            follower.before = node.before
        return node

    def _nearest(self, page: bytes) -> StateNode | None:
        return next((self._nodes[k[:16]] for k in self._up(page) if k[:16] in self._nodes), None)

    def _passes(self, follower: StateNode, node: StateNode) -> bool:
        """Whether the prompt of a deeper node begins with this node's."""
        for key in self._up(follower.tips[0]):
            if self._pages[key].depth == node.depth:
                return key.startswith(node.hash)
        return False

    def _up(self, page: bytes) -> Iterator[bytes]:
        while page != NO_PARENT:
            yield page
            page = self._pages[page].parent
