"""The token ids of stored prompts, read back from the headers of their pages.

Owns the walk over headers; reads no payload. Runs on the thread
that opens the store.
"""

from collections.abc import Iterable, Iterator

from msgspec import Struct

from daemon.cache.records import DamagedRecord, decode_page
from daemon.cache.shelf import Branch
from daemon.cache.store import Reader


class StoredPrompt(Struct, frozen=True):
    """What a chain of pages begins with: token ids (little-endian u32), and whose they were."""

    tokens: bytes
    session: str
    fingerprint: bytes
    used_us: int


def read_prompts(reader: Reader, chosen: Iterable[Branch]) -> Iterator[StoredPrompt]:
    """Read the token ids of branches; one with a damaged header is left out."""
    for branch in chosen:
        try:
            tokens = read_tokens(reader, branch.chain)
        except DamagedRecord:
            continue
        state = branch.state
        yield StoredPrompt(tokens, state.session, state.fingerprint, branch.used_us)


def read_tokens(reader: Reader, chain: Iterable[bytes]) -> bytes:
    """The token ids (little-endian u32) of a chain of pages.

    Raises:
        DamagedRecord: a header is missing or wrong.
    """
    return b"".join(_page_tokens(reader, key) for key in chain)


def _page_tokens(reader: Reader, key: bytes) -> bytes:
    record = reader.header("pages", key)
    if record is None:
        raise DamagedRecord("a page without header")
    return decode_page(key, record).tokens
