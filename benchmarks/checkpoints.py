"""Simulates how checkpoints are placed and evicted over recorded coding sessions, without a model.

    python -m benchmarks.checkpoints FOLDER [--traces 100] [--budget 8G] [--plot out.svg]

FOLDER holds hash traces in the form of the public kv-cache-tester set. Each trace is played alone,
first request included in the play and left out of the sums. For each way to keep checkpoints: the
share of prompt tokens that it would not evaluate, what it evaluates beyond the really new ones, and
what it writes; with unlimited space, and within the budget.
"""

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.checkpoint_contenders import CONTENDERS
from benchmarks.checkpoint_plot import Bar, bar_chart
from benchmarks.coding_traces import TraceRequest, load_trace, read_traces
from daemon.cache.policy import Sizes
from daemon.cache.store import footprint
from daemon.checkpoint import PAGE_TOKENS
from daemon.config import parse_bytes

STATE_BYTES = 48 * (48 * 128 * 128 + 3 * 10_240) * 4
"""27B: 48 layers of 48 heads x 128 x 128, and three rows of convolution, float32."""

KV_BYTES = {"bf16": 65_536, "q8_0": 34_816}
"""27B, a token: 16 layers x 4 heads x 256, keys and values."""

UNLIMITED = 1 << 50
RESULTS = Path(__file__).parent / "results"


class Score(Struct, frozen=True, kw_only=True):
    """How one contender did: shares of 1, tokens a request, bytes a request."""

    contender: str
    budget_bytes: int
    reused_share: float
    mean_evaluated: float
    excess_p50: int
    excess_p90: int
    excess_p99: int
    written_bytes: float


def main() -> None:
    """Play all contenders, print a table, keep the figures."""
    arguments = _arguments()
    paths = read_traces(
        arguments.folder, arguments.traces, parse_bytes(arguments.max_file), arguments.seed
    )
    if not paths:
        raise SystemExit(f"{arguments.folder}: no traces of at most {arguments.max_file}")
    traces = [load_trace(path) for path in paths]
    later = [request for trace in traces for request in trace if not request.is_first]
    num_tokens = sum(request.num_tokens for request in later)
    print(f"{len(traces)} traces, {len(later):,} requests after the first of each, {num_tokens:,} ")
    print(f"tokens; 27B shapes, KV in {arguments.kv}.")
    scores = []
    budgets = (UNLIMITED, parse_bytes(arguments.budget))
    limits = [reachable(later, _sizes(arguments.kv, budget_bytes)) for budget_bytes in budgets]
    for budget_bytes, limit in zip(budgets, limits, strict=True):
        print(_header(budget_bytes))
        print(f"{'nobody more than':24} {limit:8.2%}")
        for name in CONTENDERS:
            scores.append(play(name, traces, _sizes(arguments.kv, budget_bytes)))
            print(_line(scores[-1]), flush=True)
    _keep(arguments, paths, limits, scores)


def reachable(requests: Sequence[TraceRequest], sizes: Sizes) -> float:
    """The share of tokens that nobody exceeds within a budget: of each prompt what an earlier one
    began with, as far as that fits there with one state."""
    reused = (min(r.num_tokens - r.num_new, sizes.max_position) for r in requests)
    return sum(reused) / sum(request.num_tokens for request in requests)


def play(name: str, traces: list[list[TraceRequest]], sizes: Sizes) -> Score:
    """One contender over all traces, each with a store of its own."""
    num_tokens, num_reused, written_bytes = 0, 0, 0
    evaluated, excess = [], []
    for trace in traces:
        contender = CONTENDERS[name](sizes)
        for request in trace:
            reused = contender.reused(request)
            if not request.is_first:
                num_tokens += request.num_tokens
                num_reused += reused
                evaluated.append(request.num_tokens - reused)
                excess.append(request.num_tokens - reused - request.num_new)
        written_bytes += contender.written_bytes
    excess.sort()
    return Score(
        contender=name,
        budget_bytes=sizes.budget_bytes,
        reused_share=num_reused / num_tokens,
        mean_evaluated=sum(evaluated) / len(evaluated),
        excess_p50=excess[len(excess) // 2],
        excess_p90=excess[len(excess) * 9 // 10],
        excess_p99=excess[len(excess) * 99 // 100],
        written_bytes=written_bytes / len(evaluated),
    )


def _sizes(kv_format: str, budget_bytes: int) -> Sizes:
    return Sizes(
        state_bytes=footprint(STATE_BYTES),
        page_bytes=footprint(KV_BYTES[kv_format] * PAGE_TOKENS),
        budget_bytes=budget_bytes,
    )


def _header(budget_bytes: int) -> str:
    space = "unlimited space" if budget_bytes == UNLIMITED else f"{budget_bytes / 2**30:g} GiB"
    columns = "reused  evaluated   beyond the new: p50    p90     p99   MB written"
    return f"\n{space:26} {columns}"


def _line(score: Score) -> str:
    return (
        f"{score.contender:24} {score.reused_share:8.2%} {score.mean_evaluated:10,.0f} "
        f"{score.excess_p50:21,} {score.excess_p90:6,} {score.excess_p99:7,} "
        f"{score.written_bytes / 1e6:12,.0f}"
    )


def _keep(
    arguments: argparse.Namespace, paths: list[Path], limits: list[float], scores: list[Score]
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    found = {
        "time": now.isoformat(timespec="seconds"),
        "traces": [path.name for path in paths],
        "kv": arguments.kv,
        "reachable": limits,
        "scores": [{field: getattr(s, field) for field in s.__struct_fields__} for s in scores],
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"checkpoints-{now:%Y%m%d-%H%M%S}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{out}")
    if arguments.plot is not None:
        groups = {
            "unlimited": [s for s in scores if s.budget_bytes == UNLIMITED],
            arguments.budget: [s for s in scores if s.budget_bytes != UNLIMITED],
        }
        bars = {
            title: [Bar(s.contender, s.reused_share) for s in group]
            for title, group in groups.items()
        }
        arguments.plot.write_text(bar_chart("tokens reused", bars, limits[0]))
        print(arguments.plot)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of hash traces, *.json")
    parser.add_argument("--traces", type=int, default=100, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of their choice (%(default)s)")
    parser.add_argument("--max-file", default="900K", help="no larger files (%(default)s)")
    parser.add_argument("--budget", default="8G", help="for checkpoints (%(default)s)")
    parser.add_argument("--kv", choices=sorted(KV_BYTES), default="q8_0", help="(%(default)s)")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
