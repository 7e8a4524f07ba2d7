"""What may follow in one reply, as the engine sees it: its promises.

Whoever makes the request gives one along, if the reply must have a form; the engine knows tokens
only, not why they are allowed.
"""

from typing import Any, Protocol

import numpy as np

from daemon.errors import QwendError

Mask = np.ndarray[Any, np.dtype[np.uint32]]
"""A bit a token, `[vocab / 32]`, rounded up: token i is bit i % 32 of word i // 32; 1: allowed."""


class Constraint(Protocol):
    """The allowed tokens of one reply. Belongs to the engine thread once it is submitted."""

    @property
    def failure(self) -> QwendError | None:
        """Why nothing can follow, if so; looked at after `allowed`."""
        ...

    def allowed(self) -> Mask | None:
        """What the next token may be, None: anything. Waits if `advance` is not done.

        The mask is valid until `advance` is called.
        """
        ...

    def advance(self, token: int) -> None:
        """`token` has been chosen; returns at once and prepares the next mask meanwhile."""
        ...
