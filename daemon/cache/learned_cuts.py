"""What was learned of clients, kept over restarts: where they cut tools' results.

Owns the record of these places, of which `meta` has one for all models; README.md has its format as
a table. Knows no text. Any thread may call it; the transfer thread writes it to disk.
"""

import struct
from collections.abc import Callable, Mapping, Sequence

from daemon.cache.records import RECORD_VERSION, DamagedRecord, sealed, unsealed

CUTS_KEY = b"cuts"
MAX_CUTS = 64
_MAGIC = b"qwLC"
_HEAD = struct.Struct("<4sHH")
_DISTANCE_BYTES = 4

Write = Callable[[Mapping[bytes, bytes | None]], None]
"""Takes records by key to write, None to delete; returns at once."""


class LearnedCuts:
    """Distances in characters, the latest learned last.

    Args:
        known: what the store holds.
        write: where changes go.

    Attributes:
        known: the distances; replaced, never changed.
    """

    def __init__(self, known: tuple[int, ...], *, write: Write) -> None:
        self.known = known
        self._write = write

    def keep(self, cuts: tuple[int, ...]) -> None:
        """Know these instead; written later, unless only their order is new."""
        are_new = set(cuts) != set(self.known)
        self.known = cuts
        if are_new:
            self._write({CUTS_KEY: encode_cuts(cuts)})

    def forget(self) -> None:
        """Know none, here and on disk."""
        self.known = ()
        self._write({CUTS_KEY: None})


def encode_cuts(cuts: Sequence[int]) -> bytes:
    """Distances as a record."""
    assert len(cuts) <= MAX_CUTS
    return sealed(struct.pack(f"<4sHH{len(cuts)}I", _MAGIC, RECORD_VERSION, len(cuts), *cuts))


def decode_cuts(record: bytes) -> tuple[int, ...]:
    """Read a record.

    Raises:
        DamagedRecord: it is not whole, or holds more than there can be.
    """
    content = unsealed(record, _MAGIC, _HEAD.size)
    _, _, count = _HEAD.unpack_from(content)
    if count > MAX_CUTS or len(content) != _HEAD.size + count * _DISTANCE_BYTES:
        raise DamagedRecord("learned cuts of another number")
    return struct.unpack_from(f"<{count}I", content, _HEAD.size)
