"""read_rows(): training rows from files or from dicts, with every bad row reported."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastlora.data.row_files import Unreadable
from fastlora.data.row_forms import Row, standard_row
from fastlora.data.sources import Data, sources_of
from fastlora.errors import raise_problems

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
    '{"instruction", "input", "output"}, {"text"} or {"conversations": [{"from", "value"}, …]}'
)


def read_rows(
    data: Data, *, name: str = "data", columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Training rows in their standard form (`standard_row`), as a new list.

    A row may have more keys than its kind requires. A message with `"weight": 0` or
    `"train": false` is not trained.

    Args:
        data: files, dicts, or several sources; see `sources_of`. Weights are not used here.
        name: what error messages call rows that do not come from a file.
        columns: standard name -> name in the data.

    Raises:
        FileNotFoundError: a file does not exist.
        ModuleNotFoundError: a file needs pyarrow, which is not installed.
        CheckpointError: a file is damaged, or too long; the message names the file and the lines.
        ValueError: there are no rows, or some are of none of the kinds in `REQUIRED_KEYS`; the
            message gives their numbers (the first row is 1) and their keys.
    """
    rows, problems = [], []
    sources = sources_of(data, name)
    for source in sources:
        for place, row in source.rows(skip_unreadable=False):
            try:
                rows.append(checked_row(row, columns))
            except ValueError as error:
                problems.append(f"{place}: {error}")
    source = ", ".join(source.name for source in sources)
    raise_problems(
        ValueError, f"{source} has rows that cannot be read:", problems, f"Expected {ROW_KINDS}."
    )
    if not rows:
        raise no_rows(source)
    return rows


def no_rows(source: str) -> ValueError:
    """The error of data without rows."""
    return ValueError(f"{source} holds no rows; expected at least one of {ROW_KINDS}.")


def checked_row(row: Any, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The standard form of a row that can be encoded.

    Raises:
        ValueError: says why it cannot.
    """
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    try:
        new = standard_row(row, columns)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    kind = row_kind(new, columns)
    if columns and kind is not None:
        others = {key for keys in REQUIRED_KEYS.values() for key in keys} - {*REQUIRED_KEYS[kind]}
        new = {key: value for key, value in new.items() if key not in others}
    if wrong := row_problem(new):
        raise ValueError(wrong)
    return new


def row_problem(row: Row) -> str | None:
    """Why a row in standard form cannot be encoded; None for a good row."""
    if (kind := row_kind(row)) is None:
        is_pair = "chosen" in row and "rejected" in row
        cure = '; such pairs of replies are for loss="dpo", "orpo" or "simpo"' if is_pair else ""
        return f"keys {sorted(map(str, row))}{cure}"
    values = {key: row[key] for key in REQUIRED_KEYS[kind]}
    if kind == "messages" or (kind == "prompt" and not isinstance(row["prompt"], str)):
        return next(filter(None, (_chat_problem(k, v) for k, v in values.items())), None)
    if row.get("tools") and kind != "instruction":
        return f"has tools, which only rows with messages can have; its kind is {[*values]}"
    if kind == "instruction":
        # Alpaca's rows without input have "" there; other files have null or leave it out.
        values["input"] = row.get("input") or ""
    wrong = [f"{k} is a {type(v).__name__}" for k, v in values.items() if not isinstance(v, str)]
    return f"{', '.join(wrong)}, expected text" if wrong else None


def row_kind(row: Row, columns: Mapping[str, str] | None = None) -> RowKind | None:
    """The first kind that the row has all keys of, or None. Kinds that `columns` names come first:
    who renames a prompt does not mean a "text" beside it."""
    named: list[RowKind] = [
        k for k, keys in REQUIRED_KEYS.items() if columns and set(keys) & set(columns)
    ]
    kinds: list[RowKind] = [*named, *(kind for kind in REQUIRED_KEYS if kind not in named)]
    return next((kind for kind in kinds if all(key in row for key in REQUIRED_KEYS[kind])), None)


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
