"""The self-audit of a whole daemon: what was resumed is compared with a cold evaluation."""

from typing import Any

from daemon_process import StartDaemon

TEXT = "".join(f"def step_{n}(queue):\n    return queue.get({n})\n" for n in range(30))


def body(**options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 8, **options}


def test_resumed_requests_are_compared_however_they_were_sampled(
    start_daemon: StartDaemon,
) -> None:
    with start_daemon("--audit-share", "1") as daemon:
        requests = [
            body(),
            body(temperature=0, logprobs=True, top_logprobs=2),
            body(temperature=1.5, seed=3, response_format={"type": "json_object"}),
        ]
        answers = [
            daemon.http.post("/v1/chat/completions", json=request).raise_for_status().json()
            for request in requests
        ]
        listed = answers[1]["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in listed] == [2] * len(listed)
        daemon.wait_until(lambda stats: stats["store"]["audit"]["num_compared"] == 2)
        audit = daemon.stats()["store"]["audit"]
        again = daemon.http.post("/v1/chat/completions", json=body()).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 300, "it stays"
    assert (audit["num_mismatches"], audit["num_waiting"], audit["num_abandoned"]) == (0, 0, 0)
