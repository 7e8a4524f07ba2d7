"""tiny-coder answers the same in every dialect, and what one has evaluated another goes on from."""

from typing import Any

import anthropic
from daemon_process import DaemonProcess

ASKED = "Repeat exactly: Return the number of bytes."
SAID = "Return the number of bytes."
SYSTEM = "You are a careful coding assistant. " * 40


def test_the_same_answer_in_every_dialect(daemon: DaemonProcess) -> None:
    user: Any = [{"role": "user", "content": ASKED}]
    chat = daemon.openai.chat.completions.create(
        model="tiny-coder",
        messages=[{"role": "system", "content": SYSTEM}, *user],
        temperature=0,
        reasoning_effort="none",
    )
    assert chat.choices[0].message.content == SAID
    response = daemon.openai.responses.create(
        model="tiny-coder",
        instructions=SYSTEM,
        input=ASKED,
        temperature=0,
        reasoning={"effort": "none"},
    )
    assert response.output_text == SAID
    with anthropic.Anthropic(base_url=daemon.url, api_key="none") as client:
        message = client.messages.create(
            model="tiny-coder",
            max_tokens=100,
            system=SYSTEM,
            messages=user,
            extra_body={"temperature": 0},
        )
        counted = client.messages.count_tokens(model="tiny-coder", system=SYSTEM, messages=user)
    assert message.content[0].type == "text"
    assert message.content[0].text == SAID
    check_costs(chat.usage, response.usage, message.usage, counted.input_tokens)


def check_costs(chat: Any, response: Any, message: Any, num_prompt: int) -> None:
    """The first evaluates and writes, the others read; each counts in its own way."""
    assert chat.prompt_tokens == response.input_tokens == num_prompt
    first = chat.prompt_tokens_details
    assert first.cached_tokens == 0
    assert 0 < first.cache_write_tokens <= num_prompt
    read = response.input_tokens_details.cached_tokens
    assert read >= num_prompt // 2
    assert message.cache_read_input_tokens >= read
    parts = (
        message.input_tokens,
        message.cache_creation_input_tokens,
        message.cache_read_input_tokens,
    )
    assert sum(parts) == num_prompt


def test_a_prompt_is_kept_ahead(daemon: DaemonProcess) -> None:
    asked: Any = {
        "model": "tiny-coder",
        "system": "You keep secrets well. " * 60,
        "messages": [{"role": "user", "content": ASKED}],
    }
    with anthropic.Anthropic(base_url=daemon.url, api_key="none") as client:
        warmed = client.messages.create(max_tokens=0, **asked)
        answer = client.messages.create(max_tokens=20, **asked)
    assert warmed.content == []
    assert warmed.usage.output_tokens == 0
    written = warmed.usage.cache_creation_input_tokens or 0
    assert 0 < written <= (answer.usage.cache_read_input_tokens or 0)


def test_text_goes_on(daemon: DaemonProcess) -> None:
    create = daemon.openai.completions.create
    prompt = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    whole = create(model="tiny-coder", prompt=prompt, temperature=0, max_tokens=40)
    assert whole.choices[0].text == SAID
    chunks = create(model="tiny-coder", prompt=prompt, temperature=0, max_tokens=40, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == SAID
