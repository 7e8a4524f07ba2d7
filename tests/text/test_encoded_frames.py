from hypothesis import given
from hypothesis import strategies as st

from daemon.text.encoded_frames import EncodedFrames


def never() -> list[int]:
    raise AssertionError("encoded twice")


def test_encodes_once() -> None:
    frames = EncodedFrames()
    assert list(frames.get_or_encode("a", lambda: [1, 2])) == [1, 2]
    assert list(frames.get_or_encode("a", never)) == [1, 2]


def test_the_least_recently_used_goes_first() -> None:
    frames = EncodedFrames(max_tokens=4)
    frames.get_or_encode("a", lambda: [1, 1])
    frames.get_or_encode("b", lambda: [2, 2])
    frames.get_or_encode("a", never)
    frames.get_or_encode("c", lambda: [3])
    assert list(frames.get_or_encode("a", never)) == [1, 1]
    assert list(frames.get_or_encode("b", lambda: [4, 4])) == [4, 4]


@given(keys=st.lists(st.integers(0, 9), max_size=60))
def test_never_more_than_the_bound(keys: list[int]) -> None:
    frames = EncodedFrames(max_tokens=12)
    for key in keys:
        tokens = frames.get_or_encode(key, lambda size=key: range(size))
        assert list(tokens) == list(range(key))
        assert frames.num_tokens <= 12
