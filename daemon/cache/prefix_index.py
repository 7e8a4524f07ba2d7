"""What the store holds and what is on its way there, in memory: pages as a tree, states on it.

Owns the invariant that a state's pages are all present: removing a page removes what stands on it,
and a page goes with the last that needs it. Knows keys and sizes, no payloads and no disk. Not
thread-safe: `transfer` guards it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from daemon.cache.policy import Candidate, heat_after_use
from daemon.cache.records import HASH_BYTES, NO_PARENT, StateHeader, Use, state_key
from daemon.cache.state_tree import StateNode, StateTree
from daemon.cache.store import footprint
from daemon.checkpoint import PAGE_TOKENS, Birth


class PageRow(Struct, frozen=True):
    """A page: its key, the key of the page before it (NO_PARENT: it is the first), its payload."""

    key: bytes
    parent: bytes
    payload_bytes: int


class Page:
    """A page in the tree. `num_needing` counts the pages and states that stand on it."""

    __slots__ = ("depth", "num_bytes", "num_chain_bytes", "num_needing", "parent")

    def __init__(self, parent: bytes, num_bytes: int, above: "Page | None") -> None:
        self.parent = parent
        self.num_bytes = num_bytes
        self.depth: int = above.depth + 1 if above else 1
        self.num_chain_bytes: int = num_bytes + (above.num_chain_bytes if above else 0)
        self.num_needing = 0


SHARED_REASONS = frozenset({"system", "mark", "junction"})
"""Checkpoints that other conversations are expected to use: never superseded by one of them."""


class Removed(Struct, frozen=True):
    """Keys that are no longer in the index."""

    states: tuple[bytes, ...]
    pages: tuple[bytes, ...]


class PrefixIndex:
    """Pages and states by their keys; sizes are bytes on disk, as `footprint` counts them."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._pages: dict[bytes, Page] = {}
        self._states: dict[bytes, StateHeader] = {}
        self._births: dict[bytes, set[Birth]] = {}
        self._uses: dict[bytes, Use] = {}
        self._spared: dict[bytes, bytes] = {}
        self._sparing: dict[bytes, set[bytes]] = {}
        self._twins: dict[bytes, set[bytes]] = {}
        self._tree = StateTree(self._pages)

    # ── looking up ────────────────────────────────────────────────────────────────────────────

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return len(self._pages)

    @property
    def num_states(self) -> int:
        """States held."""
        return len(self._states)

    @property
    def states(self) -> Iterable[StateHeader]:
        """All states, in no particular order."""
        return self._states.values()

    def find(self, hashes: Sequence[bytes], limit: int, strict: bool) -> StateHeader | None:
        """The longest state of a chain at a position <= limit; at equal ones prompt-born wins."""
        num_pages = min(limit // PAGE_TOKENS, len(hashes))
        for index in range(num_pages - 1, -1, -1):
            births = self._births.get(hashes[index])
            if births is None:
                continue
            if "prompt" in births:
                return self._states[state_key(hashes[index], "prompt")]
            if not strict:
                return self._states[state_key(hashes[index], "decode")]
        return None

    def births(self, hash: bytes) -> frozenset[Birth]:
        """How the states of a prefix were born; empty when there are none."""
        return frozenset(self._births.get(hash, ()))

    def state(self, key: bytes) -> StateHeader | None:
        """A state by its key."""
        return self._states.get(key)

    def use(self, key: bytes) -> Use:
        """When and how much a state was saved and restored."""
        return self._uses[key]

    def used_us(self, key: bytes) -> int:
        """When a state was last saved or restored."""
        return self._uses[key].used_us

    def num_known(self, hashes: Sequence[bytes]) -> int:
        """How many of a chain's first pages are here, whoever computed them."""
        # All pages before a page are here, so those of a chain end once: search for the end.
        return bisect_left(hashes, True, key=lambda hash: hash not in self._twins)

    def least_recently_used(self) -> Iterator[bytes]:
        """Keys of all states, that used longest ago first; the index must not change meanwhile."""
        return iter(self._uses)

    def candidate(self, key: bytes) -> Candidate | None:
        """What is weighed of a state; None when it is not here."""
        state = self._states.get(key)
        if state is None:
            return None
        node, use = self._tree.node(state.hash), self._uses[key]
        before = node.before
        while before is not None and not self._is_as_good(before, state.born):
            before = before.before
        has_gone_on = len(node.after) == 1 and all(
            self._is_as_good(follower, state.born) for follower in node.after
        )
        return Candidate(
            reason=state.reason,
            position=state.position,
            before=before.depth * PAGE_TOKENS if before else 0,
            num_bytes=footprint(state.payload_bytes) + self._own_page_bytes(state.tip),
            heat=use.heat,
            used_us=use.used_us,
            is_superseded=has_gone_on and state.reason not in SHARED_REASONS,
        )

    def spared_by(self, key: bytes) -> bytes | None:
        """The state that may not go before this one does, if it is still here."""
        spared = self._spared.get(key)
        return spared if spared in self._states else None

    def sparing(self, key: bytes) -> frozenset[bytes]:
        """States that must go before this one: side requests made them while its conversation
        waited. None, once the conversation has gone on."""
        if key not in self._sparing or self._tree.node(key[:HASH_BYTES]).after:
            return frozenset()
        return frozenset(self._sparing[key])

    def page(self, key: bytes) -> Page | None:
        """A page by its key. While it is here, all pages before it are."""
        return self._pages.get(key)

    def chain(self, tip: bytes) -> list[bytes]:
        """Keys of all pages up to `tip`, the first page first."""
        return list(self.walk_up(tip))[::-1]

    def walk_up(self, tip: bytes) -> Iterator[bytes]:
        """Keys from `tip` to the first page."""
        while tip != NO_PARENT:
            yield tip
            tip = self._pages[tip].parent

    def ancestors(self, state: StateHeader) -> Iterator[StateHeader]:
        """The states on the way to a state, the nearest first."""
        for page in self.walk_up(state.tip):
            hash = page[:HASH_BYTES]
            for born in self._births.get(hash, ()):
                other = self._states[state_key(hash, born)]
                if other.tip == page and other is not state:
                    yield other

    def inner_pages(self) -> set[bytes]:
        """Keys of the pages that another page follows."""
        return {page.parent for page in self._pages.values()}

    # ── changing ──────────────────────────────────────────────────────────────────────────────

    def add_page(self, row: PageRow, number: int) -> bool:
        """Add page `number` of a sequence, which must be new.

        False when it does not follow on the page that it names as the one before it.
        """
        assert row.key not in self._pages
        above = self._pages.get(row.parent)
        if (above is None) != (row.parent == NO_PARENT) or number != (above.depth if above else 0):
            return False
        if above is not None:
            above.num_needing += 1
        self._pages[row.key] = Page(row.parent, footprint(row.payload_bytes), above)
        self._twins.setdefault(row.key[:HASH_BYTES], set()).add(row.key)
        self.num_bytes += self._pages[row.key].num_bytes
        return True

    def add_state(self, state: StateHeader, use: Use, spares: bytes | None = None) -> bool:
        """Add a state; False when it is stranded: its last page is absent or at another depth.

        `spares` is the key of a state that may not be evicted before this one.
        """
        assert state.key not in self._states
        tip = self._pages.get(state.tip)
        if tip is None or tip.depth != state.num_pages:
            return False
        self._tree.add(state.tip, self._is_passed(state.hash))
        tip.num_needing += 1
        self._states[state.key] = state
        self._uses[state.key] = use
        self._births.setdefault(state.hash, set()).add(state.born)
        self.num_bytes += footprint(state.payload_bytes)
        if spares in self._states and spares != state.key:
            self._spared[state.key] = spares
            self._sparing.setdefault(spares, set()).add(state.key)
        return True

    def touch(self, key: bytes, now_us: int) -> Use | None:
        """Record one more use; None when the state has gone."""
        use = self._uses.pop(key, None)
        if use is None:
            return None
        heat = heat_after_use(use.heat, use.used_us, now_us)
        self._uses[key] = use = Use(used_us=max(now_us, use.used_us), heat=heat)
        return use

    def remove_state(self, key: bytes) -> Removed:
        """Remove a state, if it is here, and the pages that nothing needs any more."""
        state = self._states.pop(key, None)
        if state is None:
            return Removed((), ())
        del self._uses[key]
        self._sparing.pop(key, None)
        spared = self._spared.pop(key, None)
        if spared in self._sparing:
            self._sparing[spared].remove(key)
        births = self._births[state.hash]
        births.remove(state.born)
        if not births:
            del self._births[state.hash]
        self.num_bytes -= footprint(state.payload_bytes)
        self._pages[state.tip].num_needing -= 1
        self._tree.remove(state.tip)
        return Removed((key,), tuple(self.prune(state.tip)))

    def prune(self, tip: bytes) -> list[bytes]:
        """Remove `tip` and the pages before it as far as nothing needs them."""
        removed = []
        while tip in self._pages and self._pages[tip].num_needing == 0:
            page = self._pages.pop(tip)
            self._forget_twin(tip)
            self.num_bytes -= page.num_bytes
            removed.append(tip)
            tip = page.parent
            if tip != NO_PARENT:
                self._pages[tip].num_needing -= 1
        return removed

    def remove_page(self, key: bytes) -> Removed:
        """Remove a page, if it is here, with every page and state that stands on it."""
        if key not in self._pages:
            return Removed((), ())
        fallen = self._standing_on(key)
        states = [state for state in self._states.values() if state.tip in fallen]
        removed = [self.remove_state(state.key) for state in states]
        pages = [page for part in removed for page in part.pages]
        return Removed(tuple(state.key for state in states), tuple(pages))

    def prune_all(self) -> list[bytes]:
        """Remove every page that no state needs."""
        idle = [key for key, page in self._pages.items() if page.num_needing == 0]
        return [removed for key in idle for removed in self.prune(key)]

    def _is_as_good(self, node: StateNode, born: Birth) -> bool:
        """Whether one of a prefix's states serves all whom a state so born serves."""
        return born == "decode" or "prompt" in self._births[node.hash]

    def _own_page_bytes(self, tip: bytes) -> int:
        """Bytes of the pages that nothing but the state on `tip` needs."""
        num_bytes = 0
        while tip != NO_PARENT and self._pages[tip].num_needing == 1:
            num_bytes += self._pages[tip].num_bytes
            tip = self._pages[tip].parent
        return num_bytes

    def _is_passed(self, hash: bytes) -> bool:
        """Whether any page follows on this prefix."""
        on_it = [self._states[state_key(hash, born)].tip for born in self._births.get(hash, ())]
        return any(self._pages[k].num_needing > on_it.count(k) for k in self._twins[hash])

    def _forget_twin(self, key: bytes) -> None:
        twins = self._twins[key[:HASH_BYTES]]
        twins.remove(key)
        if not twins:
            del self._twins[key[:HASH_BYTES]]

    def _standing_on(self, key: bytes) -> set[bytes]:
        """`key` and all pages after it. Visits every page, as damage is rare."""
        children: dict[bytes, list[bytes]] = {}
        for child, page in self._pages.items():
            children.setdefault(page.parent, []).append(child)
        fallen, waiting = {key}, [key]
        while waiting:
            found = children.get(waiting.pop(), [])
            fallen.update(found)
            waiting += found
        return fallen
