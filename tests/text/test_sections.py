"""Sections of a text, found in its tokens."""

import re

from hypothesis import given
from hypothesis import strategies as st

from daemon.text.sections import section_starts
from daemon.text.tokenizer import Tokenizer


def starts(pieces: list[bytes], *, with_definitions: bool = False) -> list[int]:
    return list(section_starts(pieces, with_definitions=with_definitions))


def test_a_section_begins_behind_an_empty_line() -> None:
    assert starts([b"one", b"\n", b"two", b"\n\n", b"three"]) == [4]
    assert starts([b"one.\n", b"\n", b"two"]) == [2]
    assert starts([b"one", b"\r\n", b" \r\n", b"  ", b"two"]) == [3]
    assert starts([b"one\n\ntwo"]) == [], "a token is never cut"
    assert starts([b"one", b"\n\n"]) == []


def test_definitions_begin_their_lines() -> None:
    tools = [b"<tools>", b"\n", b"{a", b"}\n", b"{b", b"{", b"}\n", b"</tools>"]
    assert starts(tools, with_definitions=True) == [2, 4]
    assert starts(tools) == []


def test_definitions_differ_behind_what_all_begin_with() -> None:
    opening = [b'{"', b"type", b'":', b' "', b"function", b'",', b' "', b"read", b'"}\n']
    assert starts([b"<tools>", b"\n", *opening, *opening], with_definitions=True) == [2, 9, 11, 18]


@given(
    st.lists(
        st.sampled_from(["word", " and", ".", "\n", "\n\n", " ", "\t", "{", "é", "\r\n", "# T"]),
        max_size=40,
    ).map("".join)
)
def test_they_are_those_of_the_text(tiny: Tokenizer, text: str) -> None:
    tokens = tiny.encode(text)
    found = starts([tiny.token_bytes(token) for token in tokens])
    assert found == sorted(set(found))
    for start in found:
        assert re.search(r"\n[ \t\r]*\n[ \t\r]*$", tiny.decode(tokens[:start]) + " ")
    num_sections = len(re.findall(r"\S[ \t\r]*\n(?=[ \t\r]*\n)\s*(?=\S)", "x" + text))
    assert len(found) == num_sections
