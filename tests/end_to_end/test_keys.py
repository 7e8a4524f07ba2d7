"""A daemon with a key, whose log holds text because it was asked to."""

from pathlib import Path

import openai
import pytest
from daemon_process import StartDaemon, qwend


def test_keys_and_a_log_with_text(start_daemon: StartDaemon, tmp_path: Path) -> None:
    with start_daemon("--api-key", "secret", "--log-prompts", "-ngl", "99") as daemon:
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        assert daemon.http.post("/v1/chat/completions", json=body).status_code == 401
        assert daemon.http.get("/health").json()["status"] == "ok"
        client = openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="secret", max_retries=0)
        answer = client.chat.completions.create(model="tiny-coder", **body)
        assert answer.choices[0].message.content.startswith("Hello!")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        inspect = ("inspect", "--cache-dir", tmp_path / "store", "--url", daemon.url)
        assert "API key" in qwend(*inspect, "why", "x").stderr
        assert "API key" not in qwend(*inspect, "--api-key", "secret", "why", "x").stderr
        assert daemon.stop() == 0
        log = daemon.log()
    assert 'prompt="<|im_start|>user\\nhello<|im_end|>' in log
    assert 'reply="' in log
    assert "Note: -ngl has no effect" in log
    assert "secret" not in log


def test_nothing_of_a_prompt_is_logged(start_daemon: StartDaemon) -> None:
    with start_daemon() as daemon:
        body = {"messages": [{"role": "user", "content": "Remember the word falcon."}]}
        assert daemon.http.post("/v1/chat/completions", json=body).status_code == 200
        assert daemon.http.post("/v1/chat/completions", content=b"falcon").status_code == 400
        evil = {"host": "evil.example"}
        assert daemon.http.post("/v1/chat/completions", json=body, headers=evil).status_code == 403
        assert daemon.stop() == 0
        assert "falcon" not in daemon.log()
