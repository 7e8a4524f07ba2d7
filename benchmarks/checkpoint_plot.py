"""Bars as SVG: shares of contenders, in groups, with a line for what cannot be exceeded."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

LEFT, TOP, WIDTH, ROW, GAP = 190, 40, 520, 22, 34
FROM_SHARE = 0.8
"""Where the axis begins: all are near the end of it."""


class Bar(NamedTuple):
    """A name and a share of 1."""

    name: str
    share: float


def bar_chart(title: str, groups: Mapping[str, Sequence[Bar]], ceiling: float) -> str:
    """An SVG document."""
    parts: list[str] = [_text(LEFT, 22, title, weight="bold")]
    y = TOP
    for group, bars in groups.items():
        parts.append(_text(LEFT, y + 14, group))
        y += ROW
        for bar in bars:
            parts += _bar(bar, y)
            y += ROW
        y += GAP - ROW
    x = _x(ceiling)
    parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{y}" stroke="#b33"/>')
    parts.append(_text(x - 4, y + 16, f"ceiling {ceiling:.2%}", anchor="end"))
    style = "font-family='sans-serif' font-size='13'"
    size = f'width="{LEFT + WIDTH + 80}" height="{y + 30}"'
    inner = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{inner}\n</svg>\n'


def _bar(bar: Bar, y: int) -> list[str]:
    width = max(_x(bar.share) - LEFT, 1)
    colour = "#2a6f97" if bar.name == "qwend" else "#a9b4bd"
    return [
        _text(LEFT - 8, y + 14, bar.name, anchor="end"),
        f'<rect x="{LEFT}" y="{y + 2}" width="{width}" height="{ROW - 6}" fill="{colour}"/>',
        _text(LEFT + width + 6, y + 14, f"{bar.share:.2%}"),
    ]


def _x(share: float) -> int:
    return LEFT + round(WIDTH * (share - FROM_SHARE) / (1 - FROM_SHARE))


def _text(x: int, y: int, text: str, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{escape(text)}</text>"
