"""Rebuilds the index from the headers on disk; reads no payload.

Owns the decision what of a store can still be used: damaged headers, payloads without one, pages
whose chain is broken, stranded states, uses of states that are not here, and pages that nothing
needs are named for deletion. Runs on the opening thread.
"""

from collections.abc import Iterable

from msgspec import Struct

from daemon.cache.damage import Damage, sift
from daemon.cache.prefix_index import PageRow, PrefixIndex
from daemon.cache.records import StateHeader, Use, decode_page, decode_state, decode_use
from daemon.cache.store import Reader


class LoadedIndex(Struct, frozen=True):
    """The usable part of a store, the keys of what should be deleted, and how many records of all
    tables are damaged."""

    index: PrefixIndex
    stale_pages: frozenset[bytes]
    stale_states: frozenset[bytes]
    num_damaged: int


def load_index(reader: Reader, damaged: list[Damage]) -> LoadedIndex:
    """Read all headers. A record that cannot be trusted is left out, and so is what needs it.

    Args:
        damaged: what was found so far; takes what is found here.
    """
    index = PrefixIndex()
    pages = sift("pages", reader.records("pages"), _page_row, damaged)
    states = sift("states", reader.records("states"), decode_state, damaged)
    uses = sift("uses", reader.records("uses"), decode_use, damaged)
    stale_pages = {damage.key for damage in damaged if damage.table == "pages"}
    stale_states = {damage.key for damage in damaged if damage.table == "states"}
    stale_pages |= _lone_payloads(reader, "pages", pages.keys() | stale_pages, damaged)
    stale_states |= _lone_payloads(reader, "states", states.keys() | stale_states, damaged)
    stale_pages |= _add_pages(index, pages.values())
    stale_states |= _add_states(index, states.values(), uses)
    stale_pages |= set(index.prune_all())
    stale_states |= uses.keys() - states.keys()
    return LoadedIndex(index, frozenset(stale_pages), frozenset(stale_states), len(damaged))


def _page_row(key: bytes, record: bytes) -> tuple[int, PageRow]:
    """A page's place in its sequence, and what the index keeps of it."""
    header = decode_page(key, record)
    return header.index, PageRow(key, header.parent, header.payload_bytes)


def _lone_payloads(
    reader: Reader, table: str, known: set[bytes], damaged: list[Damage]
) -> set[bytes]:
    """The keys under which a payload lies and no header."""
    lone = reader.payload_keys(table) - known
    where = Reader.payload_table(table)
    damaged += [Damage(where, key, "a payload without a header") for key in sorted(lone)]
    return lone


def _add_pages(index: PrefixIndex, rows: Iterable[tuple[int, PageRow]]) -> set[bytes]:
    """Returns the keys that could not be added."""
    in_order = sorted(rows, key=lambda pair: pair[0])
    return {row.key for number, row in in_order if not index.add_page(row, number)}


def _add_states(
    index: PrefixIndex, states: Iterable[StateHeader], uses: dict[bytes, Use]
) -> set[bytes]:
    """Returns the keys that could not be added."""
    found = [(uses.get(state.key) or Use(used_us=state.created_us), state) for state in states]
    in_order = sorted(found, key=lambda pair: pair[0].used_us)
    return {state.key for use, state in in_order if not index.add_state(state, use)}
