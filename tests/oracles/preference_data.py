"""Preference rows that several tests share."""

from typing import Any

PAIRS: list[dict[str, Any]] = [
    {
        "prompt": f"{n}:",
        "chosen": " a rank is " + "small " * (n % 3 + 1),
        "rejected": " of rows" * n,
    }
    for n in range(1, 8)
]

LABELLED: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for n, row in enumerate(PAIRS)
    for side in (("chosen", "rejected") if n % 2 else ("rejected", "chosen"))
]
