"""How numbers and strange text look on a terminal."""

from rich.console import Console

_MIN_WIDTH = 100


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    shown = Console()
    if not shown.is_terminal:
        shown.width = max(shown.width, _MIN_WIDTH)
    return shown


def printable(text: str) -> str:
    """A client chose it: no control characters to the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def size(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a number above one."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def age(then_us: int, now_us: int) -> str:
    """How long ago, in the largest whole unit."""
    seconds = max(now_us - then_us, 0) // 1_000_000
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
