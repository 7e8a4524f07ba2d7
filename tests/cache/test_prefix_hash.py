from hypothesis import given
from hypothesis import strategies as st

from daemon.cache.prefix_hash import PrefixChain, fingerprint, link
from daemon.checkpoint import PAGE_TOKENS

MODEL = fingerprint({"weights": b"1"})
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=300)


def test_fingerprint_ignores_order_and_keeps_fields_apart() -> None:
    assert fingerprint({"a": b"1", "b": b"2"}) == fingerprint({"b": b"2", "a": b"1"})
    names = [{"a": b"1", "b": b"2"}, {"a": b"2", "b": b"1"}, {"ab": b"12"}, {"a": b"1b2"}, {}]
    assert len({fingerprint(parts) for parts in names}) == len(names)
    assert len(MODEL) == 16


@given(TOKENS, st.data())
def test_growing_in_pieces_is_growing_at_once(tokens: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    pieces = PrefixChain(MODEL)
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        pieces.extend(tokens[start:stop])
    whole = PrefixChain(MODEL, tokens)
    assert pieces.hashes == whole.hashes
    assert len(whole.hashes) == len(tokens) // PAGE_TOKENS
    assert whole.num_tokens == len(tokens)


@given(TOKENS, TOKENS)
def test_hashes_agree_exactly_as_far_as_whole_pages_do(one: list[int], two: list[int]) -> None:
    common = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    num_common = min(len(one), len(two)) if common is None else common
    pairs = zip(PrefixChain(MODEL, one).hashes, PrefixChain(MODEL, two).hashes, strict=False)
    for index, (left, right) in enumerate(pairs):
        assert (left == right) is ((index + 1) * PAGE_TOKENS <= num_common)


def test_format_of_a_link() -> None:
    """The chain is part of the on-disk format: it must never change within a version."""
    chain = PrefixChain(bytes(range(16)), range(2 * PAGE_TOKENS))
    assert chain.page_tokens(0) == b"".join(i.to_bytes(4, "little") for i in range(64))
    assert chain.token_bytes(0, 128) == chain.page_tokens(0) + chain.page_tokens(1)
    assert chain.hashes[1] == link(chain.hashes[0], chain.page_tokens(1))
    assert chain.hashes[0].hex() == "abf1c146302a9028ead977321edc6ade"
    assert chain.hashes[1].hex() == "48c970b69a04b1aa1b303f3f27cde78e"
    other = PrefixChain(bytes(16), range(2 * PAGE_TOKENS))
    assert other.hashes[0] != chain.hashes[0]
