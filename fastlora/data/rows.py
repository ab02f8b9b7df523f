"""rows."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastlora.errors import CheckpointError, raise_problems

Row = Mapping[str, Any]


# ── 1. rows ───────────────────────────────────────────────────────────────────────────────
ROW_KINDS = (
    '{"messages": [{"role", "content"}, …]}, {"prompt", "completion"}, '
    '{"instruction", "input", "output"} or {"text"}'
)


def read_rows(data: str | os.PathLike[str] | Iterable[Row]) -> list[dict[str, Any]]:
    """Training rows from a .jsonl or .json file, or from any iterable of dicts, as a new list.

    A .jsonl file holds one object per line (empty lines are skipped), a .json file one list of
    objects. A row may have more keys than its kind needs; the first kind of `ROW_KINDS` that it has
    all keys of is taken.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is not JSON, with file and line numbers.
        ValueError: rows of no known kind, with their numbers (the first is 1) and their keys; no
            rows at all.
    """
    rows = list(_read_file(Path(data)) if isinstance(data, str | os.PathLike) else data)
    name = str(data) if isinstance(data, str | os.PathLike) else "the data"
    if not rows:
        raise ValueError(f"{name} holds no rows; expected at least one of {ROW_KINDS}.")
    problems = [f"row {n}: {wrong}" for n, row in enumerate(rows, 1) if (wrong := row_refusal(row))]
    raise_problems(
        ValueError, f"{name}: rows of no known kind:", problems, f"Expected {ROW_KINDS}."
    )
    return [dict(row) for row in rows]


def _read_file(path: Path) -> list[Any]:
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: expected a file that ends in .jsonl or .json.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Rows are read from .jsonl or .json files.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows write a mark in front
        rows = json.loads(text) if path.suffix == ".json" else _read_lines(path, text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise CheckpointError(
            f"{path} holds a {type(rows).__name__}, expected a list of objects. A file with one "
            "object per line is called .jsonl."
        )
    return rows


def _read_lines(path: Path, text: str) -> list[Any]:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 in strings
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


def row_refusal(row: Any) -> str | None:
    """Why a row cannot be read, or None."""
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}, not a dict: {row!r:.60}"
    if row.get("tools"):
        return "has tools, which no template is given; put them into the system message"
    columns: dict[str | None, tuple[str, ...]] = {
        "messages": ("messages",),
        "prompt": ("prompt", "completion"),
        "instruction": ("instruction", "output"),
        "text": ("text",),
    }
    if (kind := row_kind(row)) is None:
        return f"keys {sorted(map(str, row))}"
    values = {key: row[key] for key in columns[kind]}
    if kind == "messages" or (kind == "prompt" and not isinstance(row["prompt"], str)):
        return next(filter(None, (_chat_refusal(k, v) for k, v in values.items())), None)
    if kind == "instruction":
        values["input"] = row.get("input") or ""
    wrong = [f"{k} is a {type(v).__name__}" for k, v in values.items() if not isinstance(v, str)]
    return f"{', '.join(wrong)}, expected text" if wrong else None


def row_kind(row: Row) -> Literal["messages", "prompt", "instruction", "text"] | None:
    # Alpaca's own file has a "text" beside its three columns, so the order matters.
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if "instruction" in row and "output" in row:
        return "instruction"
    return "text" if "text" in row else None


def _chat_refusal(key: str, messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"{key} must be a list of at least one message; got {messages!r:.60}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{key}, message {number} has no role: {message!r:.60}"
    return None
