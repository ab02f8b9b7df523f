"""read_rows(): training rows from a file or from dicts, with every bad row reported."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastlora.arguments import PATH, Rule
from fastlora.errors import CheckpointError, raise_problems

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
    objects. A row may have more keys than its kind requires.

    Args:
        data: the path of a file, or the rows.
        name: what error messages call rows that do not come from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is not JSON; the message names the file and the lines.
        ValueError: there are no rows, or some are of none of the kinds in `REQUIRED_KEYS`; the
            message gives their numbers (the first row is 1) and their keys.
    """
    from_file = isinstance(data, str | os.PathLike)
    rows = list(_read_file(Path(data)) if from_file else data)
    source = str(data) if from_file else name
    if not rows:
        raise ValueError(f"{source} holds no rows; expected at least one of {ROW_KINDS}.")
    problems = [f"row {n}: {wrong}" for n, row in enumerate(rows, 1) if (wrong := row_problem(row))]
    raise_problems(
        ValueError, f"{source} has rows that cannot be read:", problems, f"Expected {ROW_KINDS}."
    )
    return [dict(row) for row in rows]


def _read_file(path: Path) -> list[Any]:
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: expected a file whose name ends in .jsonl or .json.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Rows are read from .jsonl or .json files.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors may write a byte order mark
        rows = json.loads(text) if path.suffix == ".json" else _read_lines(path, text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise CheckpointError(
            f"{path} holds a {type(rows).__name__}, expected a list of objects. Name a file with "
            "one object per line .jsonl."
        )
    return rows


def _read_lines(path: Path, text: str) -> list[Any]:
    rows, problems = [], []
    # Not splitlines: it also splits at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at column {error.colno}: {line:.60}")
    raise_problems(
        CheckpointError,
        f"{path}: lines that are not JSON:",
        problems,
        "Expected one object per line.",
    )
    return rows


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
    return None
