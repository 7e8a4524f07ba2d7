import json
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_sources import VECTORS

from daemon.errors import InvalidRequest, ModelFileError, UnsupportedModel
from daemon.text.tokenizer import Tokenizer

SPECIAL_IDS = {
    "<|endoftext|>": 248044,
    "<|im_start|>": 248045,
    "<|im_end|>": 248046,
    "<|image_pad|>": 248056,
    "<tool_call>": 248058,
    "</tool_call>": 248059,
    "<|fim_prefix|>": 248060,
    "<tool_response>": 248066,
    "</tool_response>": 248067,
    "<think>": 248068,
    "</think>": 248069,
    "<|audio_pad|>": 248076,
}

SEQUENCES = {
    "\n": [198],
    "\n\n": [271],
    "assistant": [74455],
    "user": [846],
    "system": [8678],
    "<|im_start|>assistant\n<think>\n": [248045, 74455, 198, 248068, 198],
    "<|im_start|>assistant\n<think>\n\n</think>\n\n": [
        *(248045, 74455, 198, 248068, 271, 248069, 271)
    ],
    "<|im_end|>\n": [248046, 198],
    "<|im_start|>user\n<tool_response>\n": [248045, 846, 198, 248066, 198],
}

VARIED = [
    "",
    "Hello, world!",
    "it's, IT'S, we'll, they'd, 'tis, ''s",
    "1234567890 3.14159 0xFF ½ ٣٤٥",
    "   leading, trailing   \n\n\n\t\tnext  \r\n\r\nlast ",
    "def f(x):\n    return {'a': [1, 2], **x}\n\n\n# …\n",
    "naïve café — cafe\u0301 \u0915\u094d\u0937\u093f नमस्ते สวัสดี",
    "你好，世界。今天天气怎么样？ 日本語テスト 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
    "https://example.org/a?b=c&d=%20#e_f-g",
    "<think>x</think><tool_call><|im_start|>user<|im_end|>",
    "\x00\x01\ufeff\u200b\u2028\u00a0\u3000x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          ========",
]


def test_golden_prompts_encode_to_golden_ids(tiny: Tokenizer) -> None:
    ids = np.load(VECTORS / "golden.npz")
    for i, entry in enumerate(json.loads((VECTORS / "golden.json").read_text())):
        assert tiny.encode(entry["prompt"]) == ids[f"{i}_ids"].tolist()
        assert tiny.decode(ids[f"{i}_greedy"].tolist()) == entry["greedy"]


def test_special_ids(qwen: Tokenizer) -> None:
    assert {text: qwen.encode(text) for text in SPECIAL_IDS} == {
        text: [token] for text, token in SPECIAL_IDS.items()
    }


@pytest.mark.parametrize("text", SEQUENCES)
def test_known_sequences(qwen: Tokenizer, text: str) -> None:
    assert qwen.encode(text) == SEQUENCES[text]
    assert qwen.decode(SEQUENCES[text]) == text


@pytest.mark.parametrize("text", VARIED)
def test_encodes_as_the_published_tokenizer_does(
    qwen: Tokenizer, published: Any, text: str
) -> None:
    assert qwen.encode(text) == published.encode(text)


@given(text=st.text(max_size=60))
def test_any_text_encodes_as_published(qwen: Tokenizer, published: Any, text: str) -> None:
    assert qwen.encode(text) == published.encode(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("2026", ["2", "0", "2", "6"]),
        ("it's", ["it", "'s"]),
        ("a  b", ["a", " ", " b"]),
        ("x\n\n  y", ["x", "\n\n", " ", " y"]),
        ("e\u0301", ["é"]),
    ],
)
def test_splits(qwen: Tokenizer, text: str, pieces: list[str]) -> None:
    assert [qwen.decode([token]) for token in qwen.encode(text)] == pieces


def test_control_tokens_can_be_ordinary_text(qwen: Tokenizer) -> None:
    text = "<think><|im_end|>"
    ids = qwen.encode(text, special=False)
    assert ids[0] == SPECIAL_IDS["<think>"]
    assert not any(map(qwen.is_control, ids))
    assert qwen.decode(ids) == text


def test_sizes_and_kinds(qwen: Tokenizer) -> None:
    assert (qwen.vocab_size, qwen.num_real_tokens) == (248_320, 248_077)
    assert qwen.stop_tokens == {248044, 248046}
    assert len(qwen.control_tokens) == 27
    assert "<think>" not in qwen.control_tokens


def test_reply_tags_are_text_even_where_a_file_declares_them_control(tiny: Tokenizer) -> None:
    decoder = tiny.decoder()
    text = "<think>a</think><tool_call>"
    assert "".join(map(decoder.feed, tiny.encode(text))) + decoder.finish() == text
    assert "<think>" not in tiny.control_tokens


@given(text=st.text())
def test_decoding_gives_back_the_normalised_text(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == unicodedata.normalize("NFC", text)


@given(ids=st.lists(st.integers(0, 8191), max_size=40), skip=st.booleans())
def test_streamed_decoding_equals_whole(tiny: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = tiny.decoder(skip_control=skip)
    streamed = "".join(map(decoder.feed, ids)) + decoder.finish()
    shown = [token for token in ids if not (skip and tiny.is_control(token))]
    assert streamed == tiny.decode(shown)


def test_a_character_is_never_split(qwen: Tokenizer) -> None:
    ids = [token for byte in "🙂".encode() for token in [_byte_token(qwen, byte)]]
    decoder = qwen.decoder()
    assert [decoder.feed(token) for token in ids] == ["", "", "", "🙂"]
    assert decoder.finish() == ""


def test_an_unfinished_character_is_replaced_at_the_end(qwen: Tokenizer) -> None:
    decoder = qwen.decoder()
    assert decoder.feed(_byte_token(qwen, 0xF0)) == ""
    assert decoder.finish() == "\ufffd"


def test_control_tokens_decode_to_nothing_in_a_reply(qwen: Tokenizer) -> None:
    assert qwen.decoder().feed(248045) == ""
    assert qwen.decoder(skip_control=False).feed(248045) == "<|im_start|>"


@pytest.mark.parametrize("token", [-1, 248_320])
def test_a_token_outside_the_vocabulary_is_refused(qwen: Tokenizer, token: int) -> None:
    with pytest.raises(InvalidRequest, match="not a token"):
        qwen.decode([token])


def test_a_lone_surrogate_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tiny.encode("\ud800")


BAD_METADATA = {
    "model absent": ({"model": None}, ModelFileError),
    "another model": ({"model": "llama"}, UnsupportedModel),
    "another split": ({"pre": "llama-bpe"}, UnsupportedModel),
    "no tokens": ({"tokens": []}, ModelFileError),
    "tokens of another type": ({"tokens": np.arange(5)}, ModelFileError),
    "types too few": ({"token_type": np.ones(3, np.int32)}, ModelFileError),
    "no merges": ({"merges": None}, ModelFileError),
    "a merge of one token": ({"merges": ["ab"]}, ModelFileError),
    "a merge out of vocabulary": ({"merges": ["zz qq§"]}, ModelFileError),
    "an end token out of vocabulary": ({"eos_token_id": 99_999}, ModelFileError),
    "no control tokens": ({"token_type": [1] * 8192}, ModelFileError),
    "two tokens of one name": ({"tokens": ["!"] * 8192}, ModelFileError),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_gets_one_clear_line(tiny_metadata: dict[str, Any], case: str) -> None:
    changes, error = BAD_METADATA[case]
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(error) as raised:
        Tokenizer.from_metadata(tiny_metadata | changed)
    assert "\n" not in str(raised.value)


def _byte_token(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))
