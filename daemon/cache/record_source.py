"""Pages and states wherever they lie: in memory on their way to the disk, or in the store.

Owns the order of looking. A record leaves the memory after it is on disk, so that what is looked
for there first and in the store then is not missed in between. Any thread that may wait.
"""

from collections.abc import Iterable

from daemon.cache.checkpoint_reader import DamagedPage, read_page, read_state
from daemon.cache.records import DamagedRecord, PageHeader, StateHeader, decode_page, with_sum
from daemon.cache.transfer import Transfer
from daemon.cache.write_queue import QueuedPage
from daemon.checkpoint import HostBytes


class RecordSource:
    """Reads one record at a time, each from the store in a view of its own, so that whoever is slow
    keeps no space from being used again."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def page(self, key: bytes) -> tuple[PageHeader, HostBytes]:
        """A page's header, with its checksum, and its payload.

        Raises:
            DamagedPage: it is missing or wrong.
        """
        queued = self._queued_page(key)
        if queued is not None:
            return with_sum(queued.header, queued.payload), queued.payload
        with self._transfer.reading() as reader:
            return read_page(reader, key)

    def state(self, key: bytes) -> tuple[StateHeader, HostBytes]:
        """A state's header, with its checksum, and its payload.

        Raises:
            DamagedRecord: it is missing or wrong.
        """
        with self._transfer.looking() as shelf:
            queued = shelf.queue.state(key)
        if queued is not None:
            return with_sum(queued.header, queued.payload), queued.payload
        with self._transfer.reading() as reader:
            return read_state(reader, key)

    def tokens(self, chain: Iterable[bytes]) -> bytes:
        """The token ids (little-endian u32) of a chain of pages, as far as they can be read."""
        found = []
        try:
            for key in chain:
                found.append(self._page_tokens(key))
        except DamagedRecord:
            pass
        return b"".join(found)

    def _page_tokens(self, key: bytes) -> bytes:
        queued = self._queued_page(key)
        if queued is not None:
            return queued.header.tokens
        with self._transfer.reading() as reader:
            record = reader.header("pages", key)
        if record is None:
            raise DamagedPage(key, "a page without header")
        return decode_page(key, record).tokens

    def _queued_page(self, key: bytes) -> QueuedPage | None:
        with self._transfer.looking() as shelf:
            return shelf.queue.page(key)
