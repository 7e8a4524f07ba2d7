"""Times constrained decoding over Qwen 3.5's vocabulary, without a model.

    python -m benchmarks.masks [--step-ms 5] [--no-save]

Two figures a token. On the engine's thread: to take the mask and to hand the chosen token on, with
a pause of `--step-ms` before, in which a GPU would evaluate the token. On the mask threads: to
consume the token and to compute the next mask, which is hidden as long as a step is longer.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.surroundings import surroundings
from daemon.text.constrainer import Constrainer, Thinking
from daemon.text.constraint import ReplyConstraint
from daemon.text.messages import ToolSpec
from daemon.text.reply_grammar import ContentForm, Guide
from daemon.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CLOSED = Thinking(False)
CODE = (ROOT / "daemon/text/replay.py").read_text()

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"file": {"type": "string"}, "line": {"type": "integer"}},
                "required": ["file", "line"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "steps"],
    "additionalProperties": False,
}
STEPS = [{"file": f"daemon/text/part_{i}.py", "line": 7 * i} for i in range(40)]
WRITE = ToolSpec(
    "write_file",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "content": {"type": "string"},
            "mode": {"type": "integer"},
        },
        "required": ["path", "content"],
    },
    {},
)
CALL = (
    "<tool_call>\n<function=write_file>\n<parameter=path>\ndaemon/text/replay.py\n</parameter>\n"
    f"<parameter=content>\n{CODE}\n</parameter>\n</function>\n</tool_call>"
)

CASES: Mapping[str, tuple[Guide, str]] = {
    "JSON by a schema": (
        Guide(content=ContentForm("json", SCHEMA, "schema")),
        json.dumps({"title": "What to do first", "steps": STEPS}, indent=2),
    ),
    "any JSON object": (
        Guide(content=ContentForm("json", {"type": "object"}, "object")),
        json.dumps({"title": CODE[:2000], "steps": STEPS}),
    ),
    "a call with a file": (Guide(calls="required", tools=(WRITE,)), CALL),
    "a call watched for": (Guide(calls="watched", tools=(WRITE,)), f"I write it.\n\n{CALL}"),
}


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--step-ms", type=float, default=5.0, help="a step of the model (5)")
    parser.add_argument("--no-save", action="store_true", help="keep no result")
    arguments = parser.parse_args()
    tokenizer = _tokenizer()
    began = time.perf_counter()
    constrainer = Constrainer(tokenizer)
    constrainer.constrain(Guide(content=ContentForm("regex", "a", "a")), CLOSED)
    ready_s = time.perf_counter() - began
    print(f"the library's view of {tokenizer.vocab_size} tokens: {ready_s:.1f} s, once")
    rows = {}
    for name, (guide, text) in CASES.items():
        began = time.perf_counter()
        constrainer.constrain(guide, CLOSED)
        compile_ms = (time.perf_counter() - began) * 1e3
        row = _times(lambda g=guide: constrainer.constrain(g, CLOSED), tokenizer, text,
                     arguments.step_ms)  # fmt: skip
        rows[name] = {"compile_ms": round(compile_ms, 1), **row}
        print(f"{name:20} {rows[name]}")
    constrainer.close()
    if not arguments.no_save:
        _save({"step_ms": arguments.step_ms, "ready_s": round(ready_s, 2), "cases": rows})


def _times(
    make: Callable[[], ReplyConstraint | None], tokenizer: Tokenizer, text: str, step_ms: float
) -> dict[str, float]:
    tokens = tokenizer.encode(text)
    engine = np.array(list(_walk(make(), tokens, step_ms / 1e3))) * 1e6
    masks = np.array(list(_walk(make(), tokens, 0.0))) * 1e6
    return {
        "tokens": len(tokens),
        "engine_us_median": round(float(np.median(engine)), 1),
        "engine_us_p99": round(float(np.percentile(engine, 99)), 1),
        "mask_us_median": round(float(np.median(masks)), 1),
        "mask_us_p99": round(float(np.percentile(masks, 99)), 1),
        "mask_us_most": round(float(masks.max()), 1),
    }


def _walk(constraint: ReplyConstraint | None, tokens: list[int], pause_s: float) -> Iterator[float]:
    """Seconds that each token takes of the thread that walks."""
    assert constraint is not None
    for token in tokens:
        if pause_s:
            time.sleep(pause_s)
        began = time.perf_counter()
        mask = constraint.allowed()
        failure = constraint.failure
        taken = time.perf_counter() - began
        assert failure is None
        assert mask is None or mask[token // 32] >> np.uint32(token % 32) & 1, "a wrong text"
        began = time.perf_counter()
        constraint.advance(token)
        yield taken + time.perf_counter() - began


def _tokenizer() -> Tokenizer:
    """The published vocabulary, as the tests make it."""
    path = ROOT / "tests/text/qwen_vocabulary.py"
    spec = importlib.util.spec_from_file_location("qwen_vocabulary", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Tokenizer.from_metadata(module.metadata(module.published()))


def _save(result: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    path = RESULTS / f"masks-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(surroundings() | result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
