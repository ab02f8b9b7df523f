"""read_row_file(): the values in a .jsonl or .json file, read as strictly as a model's JSON."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.checkpoints.file_bytes import check_size, read_bytes
from fastlora.checkpoints.json_text import first_line, unique_names
from fastlora.errors import CheckpointError, raise_problems

_MAX_FILE_BYTES = 16 * 2**30  # encoded rows are held in memory, unless they are streamed
_MAX_LINE_BYTES = 256 * 2**20  # of one row; bounds what is read of a file without line feeds
_MAX_DOCUMENT_BYTES = 4 * 2**30  # a .json file is parsed as one value, its text beside it
_MAX_SHOWN_CHARS = 60

LINE_SUFFIXES = (".jsonl", ".json")


class Unreadable(NamedTuple):
    """A line that is not JSON, in the place of a row."""

    reason: str


def read_row_file(
    path: Path, *, skip_unreadable: bool = False, streamed: bool = False
) -> Iterator[Any]:
    """The values of a .jsonl file (one per line) or a .json file (a list, or one per line).

    Empty lines are skipped. Numbers beyond the range of a float and names given twice in one object
    are errors, as in a model's files.

    With `skip_unreadable`, a line that is not JSON gives an Unreadable. Otherwise all such lines
    are reported together, after the last line. With `streamed`, a .jsonl file may have any size.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: too long, not UTF-8, or not JSON; the message names the file and the lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Rows are read from .jsonl or .json files.")
    try:
        if path.suffix == ".jsonl":
            yield from _read_lines(path, skip_unreadable, streamed)
        else:
            yield from _read_document(path, skip_unreadable)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_document(path: Path, skip_unreadable: bool) -> Iterable[Any]:
    data = read_bytes(path, _MAX_DOCUMENT_BYTES)
    try:
        rows = _parse(data)
    except json.JSONDecodeError as error:
        # A second value after the first one: JSON Lines under the other name.
        if error.msg == "Extra data" and data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
            return _read_lines(path, skip_unreadable)
        raise CheckpointError(f"{path} is not JSON in UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8: {_reason(error)}") from error
    if not isinstance(rows, list):
        raise CheckpointError(
            f"{path} holds a {type(rows).__name__}, expected a list of objects, or one object per "
            "line."
        )
    return rows


def _read_lines(path: Path, skip_unreadable: bool, streamed: bool = False) -> Iterator[Any]:
    problems: list[str] = []
    for number, line in enumerate(_lines(path, streamed), 1):
        try:
            if line.strip():
                row = _parse(line)
            else:
                continue
        except json.JSONDecodeError as error:
            shown = error.doc[:_MAX_SHOWN_CHARS]
            row = Unreadable(f"line {number}: {error.msg} at column {error.colno}: {shown!r}")
        except (ValueError, RecursionError) as error:
            row = Unreadable(f"line {number}: {_reason(error)}")
        if isinstance(row, Unreadable) and not skip_unreadable:
            problems.append(row.reason)
        else:
            yield row
    raise_problems(
        CheckpointError,
        f"{path}: lines that are not JSON in UTF-8:",
        problems,
        "Expected one object per line.",
    )


def _lines(path: Path, streamed: bool) -> Iterator[bytes]:
    """The lines of a file. Only line feeds end one: JSON strings may hold U+2028."""
    check_size(path, sys.maxsize if streamed else _MAX_FILE_BYTES)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise CheckpointError(
                    f"{path}, line {number} has over {_MAX_LINE_BYTES:,} bytes; expected one "
                    "object per line."
                )
            yield line


def _parse(data: bytes) -> Any:
    """A JSON value. A byte order mark, which Windows editors may write, is skipped."""
    text = data.decode("utf-8-sig")
    return json.loads(text, object_pairs_hook=unique_names, parse_int=_integer)


def _integer(digits: str) -> int:
    """Integers of more than 308 digits are not numbers that a data set means."""
    if len(digits) > 309 or math.isinf(float(digits)):
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
