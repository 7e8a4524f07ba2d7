"""The simulation of checkpoints over hash traces: read, played, summed up, drawn."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import checkpoints
from benchmarks.checkpoints import KV_BYTES, STATE_BYTES
from benchmarks.coding_traces import load_trace
from benchmarks.model_sizes import SIZES
from benchmarks.recorded_placement import play, prompts_of, sizes_of
from benchmarks.traces import read_sessions
from daemon.cache.policy import Sizes
from daemon.cache.store import footprint
from daemon.checkpoint import PAGE_TOKENS


def request(time_s: float, blocks: list[int], num_more: int = 10, **more: Any) -> dict[str, Any]:
    tokens = 64 * len(blocks) + num_more
    return {"t": time_s, "type": "n", "in": tokens, "out": 100, "hash_ids": blocks, **more}


def trace() -> dict[str, Any]:
    """A conversation that grows, is edited twice at one place, and has a sub-agent."""
    main = list(range(1, 200))
    requests = [request(float(number), main[: 100 + 5 * number]) for number in range(10)]
    requests += [request(20.0 + n, [*main[:60], *range(1000 * n, 1000 * n + 50)]) for n in (1, 2)]
    inner = [request(0.0, list(range(5000, 5040))), request(5.0, list(range(5000, 5050)))]
    agent = {"t": 10.5, "type": "subagent", "tool_tokens": 640, "requests": inner}
    return {"tool_tokens": 1000, "system_tokens": 920, "requests": [*requests, agent]}


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace()))
    requests = load_trace(path)
    assert [r.time_us // 10**5 for r in requests[9:12]] == [90, 105, 155]
    assert [r.is_first for r in requests] == [True, *[False] * 13]
    assert requests[1].num_new == 5 * 64 + 10
    reasons = [b.reason for b in requests[1].boundaries]
    assert reasons[:3] == ["system", "prompt", "tool"]
    assert set(reasons[3:]) == {"head"}
    assert requests[10].num_new == requests[10].num_tokens


def test_the_benchmark_runs_and_its_figures_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(trace()))
    monkeypatch.setattr(checkpoints, "RESULTS", tmp_path / "results")
    plot = tmp_path / "plot.svg"
    words = ["checkpoints", str(tmp_path), "--budget", "1G", "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", words)
    checkpoints.main()
    assert "1 traces, 13 requests" in capsys.readouterr().out
    (result,) = (tmp_path / "results").iterdir()
    scores = json.loads(result.read_text())["scores"]
    unlimited = {s["contender"]: s for s in scores if s["budget_bytes"] == checkpoints.UNLIMITED}
    ceiling = json.loads(result.read_text())["reachable"][0]
    assert unlimited["qwend"]["reused_share"] == max(s["reused_share"] for s in scores) <= ceiling
    assert unlimited["qwend"]["excess_p50"] == 0
    assert plot.read_text().count("<rect") == len(scores)


def test_the_sizes_of_a_checkpoint_follow_from_those_of_its_model() -> None:
    assert sizes_of(SIZES["27b"], "q8_0", 1) == Sizes(
        state_bytes=footprint(STATE_BYTES),
        page_bytes=footprint(KV_BYTES["q8_0"] * PAGE_TOKENS),
        budget_bytes=1,
    )


def test_recorded_requests_are_played_with_the_work_ahead_of_each_next_one(
    tmp_path: Path,
) -> None:
    rules = "\n\n".join(f"Rule {n}. " + "word " * 60 for n in range(60))
    messages = [{"role": "system", "content": rules}, {"role": "user", "content": "Look."}]
    other = [{"role": "system", "content": rules[:9000] + "Another."}, messages[1]]
    records = [
        {
            "seq": seq, "t": seq, "t_end": seq, "method": "POST", "path": "/v1/chat/completions",
            "headers": {}, "body": {"model": "m", "messages": asked}, "answer": "T1.0",
            "response": {"text": "I look. " * 20, "reasoning": "So."},
        }
        for seq, asked in enumerate((messages, other))
    ]  # fmt: skip
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, records)))
    prompts = asyncio.run(prompts_of(read_sessions(tmp_path, ())))
    assert [bool(prompt.name) for prompt in prompts] == [True, False, True, False]
    sizes = sizes_of(SIZES["27b"], "q8_0", 1 << 40)
    small = msgspec.structs.replace(sizes, state_bytes=sizes.page_bytes)
    first, second = play(prompts, small).values()
    assert first == 0
    assert 0 <= second <= 64
    assert play(prompts, sizes)["one 1 T1.0"] > 64
