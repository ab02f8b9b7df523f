"""read_rows(): training rows from a file or from dicts, with every bad row reported."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastlora.arguments import PATH, Rule
from fastlora.data.row_files import read_row_file
from fastlora.errors import raise_problems

Row = Mapping[str, Any]
RowKind = Literal["messages", "prompt", "instruction", "text"]

# The keys that make a row of each kind. A row is of the first kind that it has all keys of: rows of
# Alpaca's own file have a "text" as well as an instruction.
REQUIRED_KEYS: dict[RowKind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}

ROW_KINDS = (
    '{"messages": [{"role", "content"}, …]}, {"prompt", "completion"}, '
    '{"instruction", "input", "output"} or {"text"}'
)


def _is_data(value: Any) -> bool:
    # Old-style sequences have __getitem__ only; iter() accepts them.
    iterable = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
    return PATH.accepts(value) or (iterable and not isinstance(value, str | bytes | Mapping))


DATA = Rule(
    _is_data,
    "the path of a .jsonl or .json file, or an iterable of dicts (one of a dict's data sets)",
)


def read_rows(
    data: str | os.PathLike[str] | Iterable[Row], *, name: str = "data"
) -> list[dict[str, Any]]:
    """Training rows from a .jsonl or .json file, or from any iterable of dicts, as a new list.

    A .jsonl file holds one object per line (empty lines are skipped), a .json file one list of
    objects, or one object per line too. A row may have more keys than its kind requires. A message
    with `"weight": 0` or `"train": false` is not trained.

    Args:
        data: the path of a file, or the rows.
        name: what error messages call rows that do not come from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is not JSON, or too long; the message names the file and the
            lines.
        ValueError: there are no rows, or some are of none of the kinds in `REQUIRED_KEYS`; the
            message gives their numbers (the first row is 1) and their keys.
    """
    from_file = isinstance(data, str | os.PathLike)
    rows = list(read_row_file(Path(data)) if from_file else data)
    source = str(data) if from_file else name
    if not rows:
        raise ValueError(f"{source} holds no rows; expected at least one of {ROW_KINDS}.")
    problems = [f"row {n}: {wrong}" for n, row in enumerate(rows, 1) if (wrong := row_problem(row))]
    raise_problems(
        ValueError, f"{source} has rows that cannot be read:", problems, f"Expected {ROW_KINDS}."
    )
    return [dict(row) for row in rows]


def row_problem(row: Any) -> str | None:
    """Why a row cannot be read; None for a good row."""
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}, not a dict: {row!r:.60}"
    if row.get("tools"):
        return "has tools, which are not passed to chat templates; put them into the system message"
    if (kind := row_kind(row)) is None:
        return f"keys {sorted(map(str, row))}"
    values = {key: row[key] for key in REQUIRED_KEYS[kind]}
    if kind == "messages" or (kind == "prompt" and not isinstance(row["prompt"], str)):
        return next(filter(None, (_chat_problem(k, v) for k, v in values.items())), None)
    if kind == "instruction":
        # Alpaca's rows without input have "" there; other files have null or leave it out.
        values["input"] = row.get("input") or ""
    wrong = [f"{k} is a {type(v).__name__}" for k, v in values.items() if not isinstance(v, str)]
    return f"{', '.join(wrong)}, expected text" if wrong else None


def row_kind(row: Row) -> RowKind | None:
    """The first kind that the row has all keys of, or None."""
    return next(
        (kind for kind, keys in REQUIRED_KEYS.items() if all(key in row for key in keys)), None
    )


def _chat_problem(key: str, messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"{key} must be a list of at least one message; got {messages!r:.60}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{key}, message {number} has no role: {message!r:.60}"
        if wrong := _mask_problem(message):
            return f"{key}, message {number}: {wrong}"
    return None


def _mask_problem(message: Row) -> str | None:
    # bool is checked separately, because True == 1 and False == 0.
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return f"weight is {weight!r:.60}, expected 0 (not trained) or 1"
    if train is not None and not isinstance(train, bool):
        return f"train is {train!r:.60}, expected true or false"
    return None


def is_masked(message: Row) -> bool:
    """Whether a message says that it is not to be trained: `weight: 0` or `train: false`."""
    return message.get("weight") == 0 or message.get("train") is False
