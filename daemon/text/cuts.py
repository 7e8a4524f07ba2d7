"""Where clients cut tools' results when their history grows long: a place learned from one serves
all.

Owns a few distances, in characters, the latest seen; knows no text. Safe on any thread: what is
read is replaced, never changed.
"""

MAX_CUTS = 4
MIN_CUT = 128
"""Fewer characters than this are no page."""


class Cuts:
    """How many characters of a result's beginning were left, each time another number."""

    def __init__(self) -> None:
        self.known: tuple[int, ...] = ()

    def learn(self, cut: int) -> bool:
        """One more was seen; whether it is new. Of more than MAX_CUTS the oldest is forgotten."""
        is_new = cut >= MIN_CUT and cut not in self.known
        if cut >= MIN_CUT:
            self.known = (*(known for known in self.known if known != cut), cut)[-MAX_CUTS:]
        return is_new
