"""Draws what was measured beside its limit and its peer, as shares of the limit, to an SVG file.

    python -m benchmarks.plot DECODE.json… PREFILL.json… --peers PEERS.json --out FILE.svg

Takes the results of `decode` and `prefill` by model, and one file of a peer on the same card.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.model_sizes import SIZES, ModelSizes
from daemon.kernels.kv_format import PAGE_TOKENS, KvFormat

BANDWIDTH_GBPS = 3005.0
TFLOPS = 700.0
"""An H100's copy rate and cuBLAS's fp16 rate on it."""

BAR, GAP, LEFT, WIDTH, TOP = 13, 14, 250, 470, 64
OURS, PEER, LIMIT, INK = "#0b7285", "#adb5bd", "#f1f3f5", "#212529"


class Model(NamedTuple):
    """What bounds a model at short context: bytes of weights and of a sequence's state a step, work
    of a token."""

    label: str
    weight_gb: float
    state_gb: float
    gflop: float


MODELS = {
    "27b": Model("27B", 15.82, 0.314, 48.71),
    "9b": Model("9B", 5.05, 0.105, 13.84),
    "35b-a3b": Model("35B-A3B", 1.975, 0.132, 4.88),
}
"""Q4_K_M; states are read and written."""

CASES = {
    "decode": "decode",
    "decode_8": "decode, 8 sequences",
    "decode_24k": "decode after 24K tokens",
    "prefill_4096": "prompt of 4,096 tokens",
    "prefill_512_24k": "512 tokens after 24K",
}


NUM_BEFORE = {"decode_24k": 24_576, "prefill_512_24k": 24_576}
"""Tokens before a case's own; without an entry too few to count."""


class Rate(NamedTuple):
    """Tokens a second, and in what format keys and values are."""

    tokens_per_s: float
    kv: KvFormat


class Measured(NamedTuple):
    """Tokens a second of one case of one model."""

    label: str
    ours: float
    peer: float | None
    limit: float


def rates(record: dict[str, Any]) -> dict[str, Rate]:
    """Our cases of one results file."""
    found = {}
    for row in record["rows"]:
        if record["benchmark"] == "decode":
            names = {(1, 100): "decode", (8, 100): "decode_8", (1, 24_576): "decode_24k"}
            name = names.get((row["sequences"], row["position"]))
        else:
            names = {(4096, 0): "prefill_4096", (512, 24_576): "prefill_512_24k"}
            name = names.get((row["tokens"], row["after"]))
        if name:
            found[name] = Rate(float(row["tokens_per_s"]), KvFormat[row["kv"].upper()])
    return found


def limit(name: str, case: str, kv: KvFormat) -> float:
    """Tokens a second that the card allows.

    Decoding: bandwidth over the bytes of weights, states, and keys and values of the tokens before.
    Prompts: the matrix rate over the operations of products, and of attention to the tokens before;
    that of a prompt to itself is left out.
    """
    model, sizes, num_before = MODELS[name], SIZES[name], NUM_BEFORE.get(case, 0)
    if case.startswith("prefill"):
        return TFLOPS * 1e3 / (model.gflop + num_before * attention_gflop(sizes))
    num_sequences = 8 if case == "decode_8" else 1
    sequence_gb = model.state_gb + num_before * kv_gb(sizes, kv)
    return num_sequences * BANDWIDTH_GBPS / (model.weight_gb + num_sequences * sequence_gb)


def kv_gb(sizes: ModelSizes, kv: KvFormat) -> float:
    """Keys and values of one token, all layers."""
    return num_attention_layers(sizes) * 2 * sizes.kv_heads * kv.block_bytes / PAGE_TOKENS / 1e9


def attention_gflop(sizes: ModelSizes) -> float:
    """Of a token with one before it, all layers: a dot product and a weighted sum for each head."""
    return num_attention_layers(sizes) * sizes.q_heads * 2 * 2 * sizes.head_dim / 1e9


def num_attention_layers(sizes: ModelSizes) -> int:
    """Layers with keys and values; the others have a state."""
    return sum(map(sizes.is_attention, range(sizes.layers)))


def measured(paths: list[Path], peers: dict[str, Any]) -> list[Measured]:
    """All cases, by model in the order of MODELS."""
    ours: dict[str, dict[str, Rate]] = {}
    for path in paths:
        record = json.loads(path.read_text())
        ours.setdefault(Path(record["model"]).stem, {}).update(rates(record))
    rows = []
    for name, model in MODELS.items():
        for case, label in CASES.items():
            # Which experts eight sequences read is not known, so neither is the limit.
            if case in ours.get(name, {}) and (name, case) != ("35b-a3b", "decode_8"):
                rate = ours[name][case]
                peer = peers["tokens_per_s"].get(name, {}).get(case)
                text = f"{model.label} {label}"
                rows.append(Measured(text, rate.tokens_per_s, peer, limit(name, case, rate.kv)))
    return rows


def draw(rows: list[Measured], card: str) -> str:
    """The picture."""
    height = TOP + len(rows) * (2 * BAR + GAP) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 110}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="100%" height="100%" fill="white"/><text x="12" y="22" font-size="15">'
        f"Tokens a second on one {card}, as shares of what the card allows</text>",
        *_legend(),
    ]
    for number, row in enumerate(rows):
        parts += _bars(row, TOP + number * (2 * BAR + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> list[str]:
    parts, x = [], 12
    for color, text in ((OURS, "qwend"), (PEER, "llama.cpp"), (LIMIT, "limit")):
        parts.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17}" y="46">{text}</text>')
        x += 110
    return parts


def _bars(row: Measured, y: int) -> list[str]:
    parts = [f'<text x="{LEFT - 10}" y="{y + BAR + 4}" text-anchor="end">{row.label}</text>']
    parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{2 * BAR}" fill="{LIMIT}"/>')
    values = ((row.ours, OURS), (row.peer, PEER))
    for line, (value, color) in enumerate(values):
        if value is None:
            continue
        width, top = WIDTH * min(value / row.limit, 1.0), y + line * BAR
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{color}"/>'
        )
        text = f"{value:,.0f}"
        parts.append(
            f'<text x="{LEFT + width + 5:.1f}" y="{top + BAR - 2}" font-size="11">{text}</text>'
        )
    parts.append(f'<text x="{LEFT + WIDTH + 6}" y="{y + BAR + 4}">{row.limit:,.0f}</text>')
    return parts


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="plot", description="Draw results beside their limits.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    peers = json.loads(given.peers.read_text())
    given.out.write_text(draw(measured(given.results, peers), peers["card"]))
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
