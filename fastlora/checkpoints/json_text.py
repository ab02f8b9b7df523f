"""Helpers to read JSON strictly, without torch: processes that encode rows use them."""

from collections import Counter
from typing import Any


def first_line(error: Exception) -> str:
    """The first line of an error's message: other libraries' messages can be very long."""
    return str(error).strip().split("\n")[0]


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, for `object_pairs_hook` of json.loads.

    Raises:
        ValueError: a name is given twice. json.loads itself would silently keep the last value.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name[:80] for name, count in counts.items() if count > 1)
        raise ValueError(f"given twice: {twice[:5]}")
    return value
