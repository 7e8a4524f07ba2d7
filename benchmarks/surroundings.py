"""What a result file says of its run: when, of which commit, on which machine and card."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any


def surroundings() -> dict[str, Any]:
    """Date, commit, processor and load; card and driver where there are such."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _said_by("git", "describe", "--always", "--dirty"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        **card(),
    }


def card() -> dict[str, str]:
    """The first GPU's name and its driver, as nvidia-smi says it; nothing where there is none."""
    query = "--query-gpu=name,driver_version", "--format=csv,noheader"
    said = _said_by("nvidia-smi", *query).split("\n")[0]
    return dict(zip(("card", "driver"), said.split(", "), strict=False)) if said else {}


def _said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
