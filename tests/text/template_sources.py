"""The chat templates that text/ is tested with."""

from pathlib import Path

VECTORS = Path(__file__).parents[1] / "vectors" / "tiny-coder"
OFFICIAL_STYLE = Path(__file__).with_name("official_style.jinja").read_text()
TINY_STYLE = (VECTORS / "make" / "chat_template.jinja").read_text()
