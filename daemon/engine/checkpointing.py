"""The seam between the engine and whatever keeps checkpoints: its promises.

`daemon.cache.CheckpointCache` fulfils it without being imported; tests use an in-memory one.
All calls come from the engine thread. Positions are multiples of PAGE_TOKENS.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from daemon.checkpoint import Birth, Boundary, Found, Reason, Snapshot


class Timeline(Protocol):
    """One sequence's tokens, as the store sees them. Belongs to one sequence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append decoded tokens."""
        ...

    def find(self, limit: int, strict: bool) -> Found | None:
        """The longest usable checkpoint at a position <= limit; memory only, no I/O.

        At equal positions one born by prompt evaluation wins; `strict` finds no other.
        """
        ...

    def load(self, found: Found) -> Future[Snapshot | None]:
        """Read it on another thread; None when it proved damaged or has gone meanwhile."""
        ...

    def shared_with(self, other: Any) -> int:
        """Tokens, in whole pages, that this one and another timeline of this store begin with."""
        ...

    def name(self, position: int) -> bytes:
        """What the first `position` tokens are called, in this store and by no others."""
        ...

    def trail(self, position: int, born: Birth, num_grid_pages: int) -> Any:
        """What the pages up to `position`, which this sequence made or restored, are called in the
        store, whatever becomes of them here; see `Snapshot`."""
        ...

    def follow(self, trail: Any) -> None:
        """Go on from the pages of another timeline of this store that begins alike."""
        ...

    def positions(self, boundaries: Sequence[Boundary], start: int) -> Mapping[int, Reason]:
        """Where, in the prompt after `start`, a checkpoint is wanted and not stored yet."""
        ...

    def missing_pages(self, position: int, num_grid_pages: int) -> Sequence[int]:
        """Indices of the pages below `position` that are not stored (or queued).

        The first `num_grid_pages` were computed on the grid: any sequence's will do. The later ones
        have bits of their own: only those that this sequence saved or restored count as stored.
        """
        ...

    def save(self, snapshot: Snapshot, reason: Reason) -> None:
        """Queue for writing; findable at once, never waits. Takes the buffers over."""
        ...


class CheckpointStore(Protocol):
    """Where checkpoints live."""

    @property
    def num_wipes(self) -> int:
        """How often something was wiped, or proved wrong: then nothing that was made before may be
        gone on from, wherever it lies."""
        ...

    def expect(
        self, state_bytes: int, page_bytes: int, allocate: Callable[[int], memoryview]
    ) -> None:
        """Called once, first: how large states and pages will be, and who has buffers for them.

        `allocate` gives one of undefined content at once, on any thread.
        """
        ...

    def timeline(self, tokens: Sequence[int], session: str) -> Timeline:
        """Begin with a prompt; `session` groups checkpoints for people, not for look-up."""
        ...


class NoCheckpoints:
    """A store that keeps nothing, for those who ask for none."""

    @property
    def num_wipes(self) -> int:
        """Nothing is made."""
        return 0

    def expect(
        self, state_bytes: int, page_bytes: int, allocate: Callable[[int], memoryview]
    ) -> None:
        """Nothing to prepare."""

    def timeline(self, tokens: Sequence[int], session: str) -> "NoTimeline":
        """The same for every prompt."""
        return NoTimeline()


class NoTimeline:
    """Finds nothing and wants nothing."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Nothing to extend."""

    def find(self, limit: int, strict: bool) -> Found | None:
        """Always a miss."""
        return None

    def load(self, found: Found) -> Future[Snapshot | None]:
        """Never called, since nothing is found."""
        raise AssertionError("nothing was found")

    def shared_with(self, other: Any) -> int:
        """Nothing that would be found."""
        return 0

    def name(self, position: int) -> bytes:
        """Nothing has a name."""
        return b""

    def trail(self, position: int, born: Birth, num_grid_pages: int) -> None:
        """Nothing has a name."""

    def follow(self, trail: Any) -> None:
        """Nothing to remember."""

    def positions(self, boundaries: Sequence[Boundary], start: int) -> Mapping[int, Reason]:
        """No position is wanted."""
        return {}

    def missing_pages(self, position: int, num_grid_pages: int) -> Sequence[int]:
        """No page is wanted."""
        return ()

    def save(self, snapshot: Snapshot, reason: Reason) -> None:
        """Dropped."""
