"""The token ids of stored prompts, read back from the headers of their pages.

Owns the choice of prompts and the walk over their headers; reads no payload. Runs on the thread
that opens the store.
"""

from collections.abc import Iterable, Iterator

from msgspec import Struct

from daemon.cache.prefix_index import PrefixIndex
from daemon.cache.records import DamagedRecord, StateHeader, decode_page
from daemon.cache.store import Reader


class StoredPrompt(Struct, frozen=True):
    """What a chain of pages begins with: token ids (little-endian u32), and whose they were."""

    tokens: bytes
    session: str
    fingerprint: bytes
    used_us: int


class Branch(Struct, frozen=True):
    """A state that no other stands on, and the keys of its pages, the first page first."""

    state: StateHeader
    used_us: int
    chain: tuple[bytes, ...]


def branches(index: PrefixIndex, max_tokens: int) -> list[Branch]:
    """The ends of the index's tree, the last used first, as many as `max_tokens` allow."""
    inner = index.inner_pages()
    ends = {state.tip: state for state in index.states if state.tip not in inner}
    latest = sorted(ends.values(), key=lambda state: index.used_us(state.key), reverse=True)
    chosen, num_tokens = [], 0
    for state in latest:
        num_tokens += state.position
        if num_tokens > max_tokens:
            break
        chosen.append(Branch(state, index.used_us(state.key), tuple(index.chain(state.tip))))
    return chosen


def read_prompts(reader: Reader, chosen: Iterable[Branch]) -> Iterator[StoredPrompt]:
    """Read the token ids of branches; one with a damaged header is left out."""
    for branch in chosen:
        try:
            tokens = b"".join(_page_tokens(reader, key) for key in branch.chain)
        except DamagedRecord:
            continue
        state = branch.state
        yield StoredPrompt(tokens, state.session, state.fingerprint, branch.used_us)


def _page_tokens(reader: Reader, key: bytes) -> bytes:
    record = reader.header("pages", key)
    if record is None:
        raise DamagedRecord("a page without header")
    return decode_page(key, record).tokens
