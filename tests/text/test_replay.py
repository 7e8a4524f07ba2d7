import pytest

from daemon.text.replay import Cut, replay_entries, shown_tokens
from daemon.text.tokenizer import Tokenizer

OPEN = "<|im_start|>assistant\n<think>\n"
SHUT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def entries(tokenizer: Tokenizer, generation: str, reply: str) -> list[str]:
    tokens = tokenizer.encode(reply)
    found = replay_entries(tokenizer, tokenizer.encode(generation), tokens)
    by_text = [(text, kept) for text, kept in found if text.startswith("<|im_start|>")]
    assert all(tokenizer.decode(kept) == text for text, kept in by_text)
    return [text for text, _ in by_text]


@pytest.mark.parametrize(
    ("generation", "reply", "texts"),
    [
        (
            OPEN,
            "Hm.\n</think>\n\nYes.",
            [f"{OPEN}Hm.\n</think>\n\nYes.<|im_end|>\n", "<|im_start|>assistant\nYes.<|im_end|>\n"],
        ),
        (SHUT, "Yes.", [f"{SHUT}Yes.<|im_end|>\n", "<|im_start|>assistant\nYes.<|im_end|>\n"]),
        (OPEN, "cut off", [f"{OPEN}cut off<|im_end|>\n"]),
        (OPEN, "Hm.</think>Yes.", [f"{OPEN}Hm.</think>Yes.<|im_end|>\n"]),
        ("<|im_start|>assistant\n", "Yes.", ["<|im_start|>assistant\nYes.<|im_end|>\n"]),
    ],
)
def test_what_is_remembered(qwen: Tokenizer, generation: str, reply: str, texts: list[str]) -> None:
    assert entries(qwen, generation, reply) == texts


def test_the_stop_token_makes_no_difference(qwen: Tokenizer) -> None:
    assert entries(qwen, OPEN, "a\n</think>\n\nb<|im_end|>") == entries(
        qwen, OPEN, "a\n</think>\n\nb"
    )


def test_a_reply_with_control_tokens_is_not_remembered(qwen: Tokenizer) -> None:
    assert entries(qwen, OPEN, "a<|fim_prefix|>b") == []


def test_a_reply_of_broken_bytes_is_not_remembered(qwen: Tokenizer) -> None:
    broken = qwen.encode("🙂")[:-1] or [next(i for i in range(256) if _is_lead(qwen, i))]
    assert replay_entries(qwen, qwen.encode(OPEN), broken) == []


def _is_lead(tokenizer: Tokenizer, token: int) -> bool:
    return tokenizer.token_bytes(token) == b"\xf0"


@pytest.mark.parametrize(
    ("reply", "cut", "shown"),
    [
        ("One. STOP", Cut("STOP", keeps_mark=False), "One. "),
        ("One.\n\nTwo", Cut("\nT", keeps_mark=False), "One.\n"),
        ("STOP at STOP", Cut("STOP", keeps_mark=False), "STOP at "),
        ("<tool_call></tool_call>\n", Cut("</tool_call>", keeps_mark=True), None),
        (
            "a<tool_call></tool_call>",
            Cut("</tool_call>", keeps_mark=True),
            "a<tool_call></tool_call>",
        ),
        ("🙂🙂", Cut("🙂", keeps_mark=False), "🙂"),
        ("One.<|im_end|>", None, "One."),
    ],
)
def test_what_a_client_was_shown_of_a_reply_that_was_cut(
    qwen: Tokenizer, reply: str, cut: Cut | None, shown: str | None
) -> None:
    sampled = qwen.encode(reply)
    tokens = shown_tokens(qwen, sampled, cut)
    assert qwen.decode(tokens) == (shown or "")
    if tokens[:-2]:
        assert tokens[:-2] == tuple(sampled[: len(tokens) - 2])


def test_a_token_that_a_stop_string_cuts_in_two_is_encoded_anew(qwen: Tokenizer) -> None:
    sampled = [*qwen.encode("All right"), *qwen.encode(" functions")]
    tokens = shown_tokens(qwen, sampled, Cut("unct", keeps_mark=False))
    assert qwen.decode(tokens) == "All right f"
    assert tokens[:2] == tuple(sampled[:2])
