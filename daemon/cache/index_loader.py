"""Rebuilds the index from the headers on disk; reads no payload.

Owns the decision what of a store can still be used: damaged headers, pages whose chain is broken,
stranded states and pages that nothing needs are named for deletion. Runs on the opening thread.
"""

from msgspec import Struct

from daemon.cache.prefix_index import PageRow, PrefixIndex
from daemon.cache.records import DamagedRecord, Use, decode_page, decode_state
from daemon.cache.store import Reader


class LoadedIndex(Struct, frozen=True):
    """The usable part of a store, and the keys of what should be deleted."""

    index: PrefixIndex
    stale_pages: frozenset[bytes]
    stale_states: frozenset[bytes]
    num_damaged: int


def load_index(reader: Reader) -> LoadedIndex:
    """Read all headers. A record that cannot be trusted is left out, and so is what needs it."""
    index = PrefixIndex()
    broken_pages, num_damaged_pages = _add_pages(index, reader)
    broken_states, num_damaged_states = _add_states(index, reader)
    stale_pages = frozenset(broken_pages) | frozenset(index.prune_all())
    num_damaged = num_damaged_pages + num_damaged_states
    return LoadedIndex(index, stale_pages, frozenset(broken_states), num_damaged)


def _add_pages(index: PrefixIndex, reader: Reader) -> tuple[list[bytes], int]:
    """Returns the keys that could not be added, and how many of them were damaged."""
    rows, stale = [], []
    for key, record in reader.headers("pages"):
        try:
            header = decode_page(key, record)
        except DamagedRecord:
            stale.append(key)
        else:
            rows.append((header.index, PageRow(key, header.parent, header.payload_bytes)))
    num_damaged = len(stale)
    for number, row in sorted(rows, key=lambda pair: pair[0]):
        if not index.add_page(row, number):
            stale.append(row.key)
    return stale, num_damaged


def _add_states(index: PrefixIndex, reader: Reader) -> tuple[list[bytes], int]:
    uses = reader.uses()
    stale, found = [], []
    for key, record in reader.headers("states"):
        try:
            header = decode_state(key, record)
        except DamagedRecord:
            stale.append(key)
        else:
            found.append((uses.get(key) or Use(used_us=header.created_us), header))
    num_damaged = len(stale)
    for use, header in sorted(found, key=lambda pair: pair[0].used_us):
        if not index.add_state(header, use):
            stale.append(header.key)
    return stale, num_damaged
