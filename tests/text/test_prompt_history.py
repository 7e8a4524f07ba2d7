import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.text.prompt_history import FrameShape, PastPrompt, PromptHistory, common_length

START, END, NEWLINE = 1, 2, 3
SHAPE = FrameShape(START, (END, NEWLINE))


def frame(*words: int) -> list[int]:
    return [START, *words, END, NEWLINE]


def words(first: int, count: int = 200) -> list[int]:
    return list(range(first, first + count))


GENERATION = [START, 9]


def past(name: str, tokens: list[int], session: str = "s", **others: object) -> PastPrompt:
    fields = {"num_prompt": len(tokens), "began_s": 0.0, **others}
    return PastPrompt(id=name, session=session, tokens=PromptHistory.tokens(tokens), **fields)  # type: ignore[arg-type]


def test_the_longest_common_beginning_wins() -> None:
    history = PromptHistory(SHAPE)
    system = frame(*words(1000))
    history.add(past("one", [*system, *frame(*words(3000)), *GENERATION]))
    history.add(past("other", [*frame(*words(5000)), *GENERATION]))
    nearest = history.nearest([*system, *frame(*words(4000)), *GENERATION], "t")
    assert nearest is not None
    assert (nearest.past.id, nearest.num_common) == ("one", len(system) + 1)
    assert nearest.num_new == 200 + len(frame()) - 1 + len(GENERATION)


def test_a_change_at_the_very_beginning_is_found_by_what_follows() -> None:
    history = PromptHistory(SHAPE)
    rest = [token for first in (2000, 3000, 4000) for token in frame(*words(first))]
    history.add(past("long", [*frame(50, *words(1000)), *rest, *GENERATION]))
    for number in range(20):
        history.add(past(f"noise {number}", [*frame(60 + number), *GENERATION], f"n{number}"))
    nearest = history.nearest([*frame(51, *words(1000)), *rest, *GENERATION], "another")
    assert nearest is not None
    assert (nearest.past.id, nearest.num_common, nearest.num_new) == ("long", 1, 1)


def test_nothing_in_common_is_no_neighbour() -> None:
    history = PromptHistory(SHAPE)
    assert history.nearest(frame(5), "s") is None
    history.add(past("one", [*frame(*words(1000)), *GENERATION]))
    assert history.nearest([*frame(*words(2000)), *GENERATION], "other") is None
    assert history.nearest([*frame(*words(2000)), *GENERATION], "s") is not None


def test_a_reply_belongs_to_the_timeline() -> None:
    history = PromptHistory(SHAPE)
    prompt = [*frame(*words(1000)), *GENERATION]
    history.add(past("one", prompt))
    history.end("one", [7, 7, 7], "ended", len(prompt) + 3)
    next_prompt = [*prompt, 7, 7, 7, END, NEWLINE, *frame(*words(2000)), *GENERATION]
    nearest = history.nearest(next_prompt, "s")
    assert nearest is not None
    assert nearest.num_common == len(prompt) + 3
    assert nearest.past.num_evaluated == len(prompt) + 3
    assert nearest.num_new == len(next_prompt) - len(prompt) - 3


def test_a_timeline_takes_the_place_of_those_it_begins_with() -> None:
    history = PromptHistory(SHAPE)
    prompt = [*frame(*words(1000)), *GENERATION]
    history.add(past("one", prompt))
    history.add(past("while it runs", [*prompt, 8]))
    assert len(history) == 2
    history.end("one", [], "ended", len(prompt))
    history.add(past("two", [*prompt, 7, 7]))
    nearest = history.nearest([*prompt, 7, 7, 7], "s")
    assert nearest is not None
    assert (nearest.past.id, nearest.past.num_evaluated, len(history)) == ("two", len(prompt), 2)


def test_bounds_and_forgetting() -> None:
    history = PromptHistory(SHAPE, max_tokens=500, max_prompts=3)
    for number in range(5):
        history.add(past(str(number), frame(*words(1000 * number, 10)), str(number % 2)))
    assert len(history) == 3
    history.forget("0")
    assert (len(history), history.num_tokens) == (1, 13)
    history.forget("1")
    assert (len(history), history.num_tokens) == (0, 0)
    history.add(past("too long", words(0, 501)))
    assert len(history) == 0


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 199])
def test_common_length(position: int) -> None:
    one = np.arange(200, dtype=np.uint32)
    other = one.copy()
    other[position] = 999
    assert common_length(one, other) == common_length(other[:199], one) == position
    assert common_length(one, one) == 200


tokens = st.lists(st.integers(4, 6), max_size=300)


@given(st.lists(tokens, min_size=1, max_size=6), tokens)
def test_without_frames_the_longest_beginning_is_found_to_the_page(
    earlier: list[list[int]], prompt: list[int]
) -> None:
    history = PromptHistory(SHAPE)
    for number, sequence in enumerate(earlier):
        history.add(past(str(number), sequence))
    nearest = history.nearest(prompt, "s")
    assert nearest is not None
    array = PromptHistory.tokens(prompt)
    longest = max(common_length(array, PromptHistory.tokens(other)) for other in earlier)
    assert nearest.num_common == common_length(array, nearest.past.tokens)
    assert longest - 64 < nearest.num_common
    assert 0 <= nearest.num_new <= len(prompt) - nearest.num_common


@given(st.lists(st.integers(0, 3), min_size=20, max_size=200), st.data())
def test_new_tokens_are_those_that_stand_nowhere_in_the_earlier_one(
    middle: list[int], data: st.DataObject
) -> None:
    """A piece put into the middle is new, and no more than its neighbourhood beside it."""
    place = data.draw(st.integers(0, 300))
    earlier = words(100, 300)
    history = PromptHistory(SHAPE)
    history.add(past("one", earlier))
    nearest = history.nearest([*earlier[:place], *middle, *earlier[place:]], "s")
    assert nearest is not None
    tail = 300 - place
    assert nearest.num_new == len(middle) + (tail if tail < 8 else 0)


def test_a_conversation_that_goes_on_is_nearest_to_itself() -> None:
    """Not to its sibling, which happens to have read the same file."""
    history = PromptHistory(SHAPE)
    file = frame(*words(5000))
    own = [*frame(*words(1000)), *frame(1), *GENERATION]
    history.add(past("own", own, "a", state="ended"))
    sibling = [*frame(*words(1000)), *frame(2), *file, *GENERATION]
    history.add(past("sibling", sibling, "b", state="ended"))
    nearest = history.nearest([*own, *frame(8)[1:], *file, *GENERATION], "a")
    assert nearest is not None
    assert nearest.past.id == "own"


def test_of_equal_beginnings_the_one_with_the_same_messages_behind_is_nearest() -> None:
    history = PromptHistory(SHAPE)
    system, file = frame(*words(1000)), frame(*words(5000, 100))
    whole = [*system, *file, *GENERATION]
    history.add(past("whole", whole, state="ended"))
    history.add(past("cut", [*system, *frame(*words(5000, 40)), *GENERATION], state="ended"))
    changed = [*system[:150], 77, *system[151:], *file, *GENERATION]
    nearest = history.nearest(changed, "s")
    assert nearest is not None
    assert (nearest.past.id, nearest.num_common, nearest.num_new) == ("whole", 150, 1)
