"""Several clients at once, clients that go away, and the end by a signal."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from daemon_process import DaemonProcess, StartDaemon

ENDLESS = {"logit_bias": {"8178": -100, "8176": -100}, "max_tokens": 4000, "temperature": 0}
"""Bans the tokens that end a reply."""


def chat(daemon: DaemonProcess, content: str, **options: Any) -> Any:
    return daemon.openai.chat.completions.create(
        model="tiny-coder", messages=[{"role": "user", "content": content}], **options
    )


def test_two_streams_take_turns(daemon: DaemonProcess) -> None:
    """The second begins long before the first could end."""
    with chat(daemon, "Implement parse.", stream=True, **ENDLESS) as first:
        for _, _ in zip(range(5), first, strict=False):
            pass
        answer = chat(daemon, "hello", temperature=0)
        assert answer.choices[0].message.content.startswith("Hello!")
        assert daemon.stats()["running"] == 1
        assert next(iter(first)).choices
    daemon.wait_until(lambda stats: not stats["running"])


def test_together_they_answer_as_each_alone(daemon: DaemonProcess) -> None:
    questions = [f"Repeat exactly: Return the number of {word}." for word in ("bytes", "lines")]
    questions += ["Remember the word falcon.", "hello"]
    alone = [chat(daemon, question, temperature=0) for question in questions]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda text: chat(daemon, text, temperature=0), questions))
    texts = [answer.choices[0].message.content for answer in alone]
    assert [answer.choices[0].message.content for answer in together] == texts
    assert texts[0] == "Return the number of bytes."


def leave_a_stream(client: httpx.Client, body: dict[str, Any]) -> None:
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def leave_while_waiting(client: httpx.Client, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=1.0)


@pytest.mark.parametrize("leave", [leave_a_stream, leave_while_waiting])
def test_a_client_that_goes_away_ends_its_request(
    daemon: DaemonProcess, leave: Callable[[httpx.Client, dict[str, Any]], None]
) -> None:
    before = daemon.stats()["finished"].get("cancelled", 0)
    body = {"messages": [{"role": "user", "content": "hello"}], **ENDLESS}
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        leave(client, body)
    daemon.wait_until(
        lambda stats: not stats["running"] and stats["finished"].get("cancelled") == before + 1,
        timeout_s=20,
    )


def test_sigterm_ends_running_replies_and_keeps_their_work(start_daemon: StartDaemon) -> None:
    long_prompt = "Explain this. " + "def step(queue): return queue.get()\n" * 40
    with start_daemon() as daemon:
        ended: list[bool] = []
        started = threading.Event()

        def read_to_the_end() -> None:
            try:
                with chat(daemon, long_prompt, stream=True, **ENDLESS) as chunks:
                    for _ in chunks:
                        started.set()
            except openai.APIError:
                ended.append(True)

        reader = threading.Thread(target=read_to_the_end)
        reader.start()
        assert started.wait(60)
        time.sleep(0.5)
        assert daemon.stop() == 0
        reader.join(30)
        assert ended == [True]
        assert "Traceback" not in daemon.log()
    with start_daemon() as daemon:
        usage = chat(daemon, long_prompt, max_tokens=1).usage
        assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 64 + 8
