"""Recorded coding sessions as hash traces, in the form of the public kv-cache-tester set.

A trace is a JSON file: `requests` in order, each with its time `t` in seconds, `in` and `out` in
tokens, and `hash_ids`, one for each whole block of 64 prompt tokens, equal where blocks are equal;
a request of type "subagent" holds the requests of one of its own, their times counted from its.
`tool_tokens` and `system_tokens` begin the prompt. The set has no text: each hash stands for 64
made-up tokens.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from daemon.cache.prefix_hash import link
from daemon.checkpoint import PAGE_TOKENS, Boundary
from daemon.text.prompt import HEAD_TOKENS

MODEL = bytes(16)


class TraceRequest(Struct, frozen=True):
    """One prompt: the chain of its pages' hashes, and where it has meaning.

    `num_new` are its tokens beyond the longest prefix that it shares with any earlier prompt of
    its trace: what nobody can avoid to evaluate.
    """

    time_us: int
    num_tokens: int
    hashes: tuple[bytes, ...]
    boundaries: tuple[Boundary, ...]
    is_first: bool
    num_new: int


def read_traces(folder: Path, count: int, max_file_bytes: int, seed: int) -> list[Path]:
    """A random choice of a folder's traces, the same for the same seed."""
    paths = sorted(p for p in folder.glob("*.json") if p.stat().st_size <= max_file_bytes)
    return sorted(random.Random(seed).sample(paths, min(count, len(paths))))


def load_trace(path: Path) -> list[TraceRequest]:
    """The requests of a trace and of its sub-agents, in the order of their times."""
    trace = json.loads(path.read_bytes())
    head = int(trace.get("tool_tokens", 0)) + int(trace.get("system_tokens", 0))
    raw = sorted(_flat(trace, 0.0, head, "main"), key=lambda item: item[0])
    known: set[bytes] = set()
    ends: dict[str, int] = {}
    requests = []
    for time_s, agent, head_tokens, request in raw:
        hashes = _chain(request["hash_ids"])
        num_known = next((i for i, h in enumerate(hashes) if h not in known), len(hashes))
        boundaries = _boundaries(request["in"], head_tokens, ends.get(agent))
        requests.append(
            TraceRequest(
                time_us=int(time_s * 1e6),
                num_tokens=request["in"],
                hashes=hashes,
                boundaries=boundaries,
                is_first=not known,
                num_new=request["in"] - num_known * PAGE_TOKENS,
            )
        )
        known.update(hashes)
        ends[agent] = request["in"] + request["out"]
    return requests


def _flat(
    trace: dict[str, Any], start_s: float, head: int, agent: str
) -> Iterator[tuple[float, str, int, dict[str, Any]]]:
    for number, request in enumerate(trace["requests"]):
        time_s = start_s + float(request["t"])
        if request["type"] == "subagent":
            inner = int(request.get("tool_tokens", 0)) + int(request.get("system_tokens", 0))
            yield from _flat(request, time_s, inner, f"{agent}/{number}")
        elif request["hash_ids"]:
            yield time_s, agent, head, request


def _chain(hash_ids: list[int]) -> tuple[bytes, ...]:
    hashes = []
    parent = MODEL
    for hash_id in hash_ids:
        parent = link(parent, hash_id.to_bytes(4, "little") * PAGE_TOKENS)
        hashes.append(parent)
    return tuple(hashes)


def _boundaries(num_tokens: int, head: int, last_end: int | None) -> tuple[Boundary, ...]:
    """End of system and tools, start of what followed the last reply, end of the prompt."""
    wanted = [Boundary(head, "system"), Boundary(num_tokens, "prompt")]
    if last_end is not None:
        wanted.append(Boundary(last_end, "tool"))
        first = last_end // PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS
        last = min(last_end + HEAD_TOKENS, num_tokens)
        wanted += [Boundary(place, "head") for place in range(first, last + 1, PAGE_TOKENS)]
    return tuple(b for b in wanted if 0 < b.position <= num_tokens)
