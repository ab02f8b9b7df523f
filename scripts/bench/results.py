"""Rows of measurements: one JSON object per line, appended and never changed.

scripts/bench/results.jsonl holds every figure that the benchmarks page cites. A row has these keys:

    date      "2026-11-29"
    commit    short hash of the code that was measured, or null if it was not recorded
    machine   {"card": ..., "torch": ..., "triton": ...}, and the versions of other packages
    command   the command that gives these figures again
    figures   flat; the unit is part of each name: {"ms": 90.7, "peak_gib": 10.22}
    key       optional and unique; comments in the code cite a row by it
    note      optional; differences from other rows that the command does not show
"""

import datetime
import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def row(command: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A row of today, of the checked-out commit and of this machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "command": command,
        "figures": figures,
    }


def append(file: Path, new: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(new) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All rows, oldest first; none if the file does not exist yet."""
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def machine() -> dict[str, str]:
    """The card, and the versions that decide which kernels run on it."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"card": card, "torch": torch.__version__}
    try:
        return facts | {"triton": version("triton")}
    except PackageNotFoundError:
        return facts


def commit() -> str | None:
    """The short hash, with a "+" if tracked files were changed since; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
