"""sources_of(): where rows come from. Files, folders, globs, iterables, and mixtures of them."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fastlora.arguments import PATH, Rule, is_tensor, number
from fastlora.data.row_files import LINE_SUFFIXES, read_row_file
from fastlora.data.row_forms import Row, without_nulls
from fastlora.data.table_files import (
    TABLE_SUFFIXES,
    read_table_file,
    require_pyarrow,
    table_batches,
)

SUFFIXES = (*LINE_SUFFIXES, *TABLE_SUFFIXES)

# Names of files that hold rows to evaluate on, by the conventions of data sets on the Hub.
_HELD_OUT = re.compile(r"(^|[-_.])(test|validation|valid|val|eval|dev|heldout)([-_.]|$)")


@runtime_checkable
class Batches(Protocol):
    """pyarrow's tables and data sets."""

    def to_batches(self) -> Any:
        """Record batches."""
        ...


SourceLike = str | os.PathLike[str] | Iterable[Row] | Batches
Data = SourceLike | Sequence[SourceLike] | Mapping[Any, float]

_WEIGHT = number(above=0)


def _is_rows(value: Any) -> bool:
    # Old-style sequences have __getitem__ only; iter() accepts them.
    iterable = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
    refused = isinstance(value, str | bytes | Mapping) or is_tensor(value)
    return (iterable or hasattr(value, "to_batches")) and not refused


def _is_source(value: Any) -> bool:
    return PATH.accepts(value) or _is_rows(value)


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(
            _is_source(key) and _WEIGHT.accepts(weight) for key, weight in value.items()
        )
    return _is_source(value)


DATA = Rule(
    _is_data,
    f"the path of a file ({', '.join(SUFFIXES)}), of a folder of them or a glob; an iterable of"
    " dicts (one of a dict's data sets); a list of these; or a dict {source: weight} with weights"
    " > 0",
)


class Source(NamedTuple):
    """One of the sources that a run's data consist of."""

    name: str
    files: tuple[Path, ...]  # empty for an iterable
    iterable: Any
    weight: float | None  # share of the examples; None if no weights were given
    several: bool  # of this run: places then name the source

    def rows(self, *, skip_unreadable: bool, streamed: bool = False) -> Iterator[tuple[str, Any]]:
        """(place, row), in order. The places are "row 1", ... or "FILE, row 1", ...

        With `skip_unreadable`, a line that is not JSON gives an Unreadable in place of a row. With
        `streamed`, a .jsonl file may have any size.

        Raises:
            CheckpointError: a file is damaged.
            ModuleNotFoundError: a file needs pyarrow, which is not installed.
        """
        named = self.several or len(self.files) > 1
        if not self.files:
            prefix = f"{self.name}, " if named else ""
            for n, row in enumerate(_iterated(self.iterable), 1):
                yield f"{prefix}row {n}", row
        for file in self.files:
            prefix = f"{file}, " if named else ""
            for n, row in enumerate(_file_rows(file, skip_unreadable, streamed), 1):
                yield f"{prefix}row {n}", row

    @property
    def count(self) -> int | None:
        """The number of rows, if it is known before they are read."""
        return len(self.iterable) if not self.files and hasattr(self.iterable, "__len__") else None


def sources_of(data: Data, name: str) -> list[Source]:
    """The sources of `data`, in order. No row is read yet.

    Args:
        data: one source, a list of sources, or a dict of weights. A source is a file, a folder
            (all its files of one format, not those of subfolders), a glob ("**" reaches into
            folders), a pyarrow table or data set, or an iterable of dicts, such as a Hugging Face
            data set.
        name: of an iterable in messages.

    Raises:
        FileNotFoundError: a file does not exist, or a glob matches none.
        ModuleNotFoundError: a file needs pyarrow, which is not installed.
        ValueError: a name ends in no suffix that can be read, a folder holds several formats or
            splits, or a source is a DataFrame.
    """
    weights: list[float | None] = [None]
    given: list[Any] = [data]
    if isinstance(data, Mapping):
        given, weights = list(data.keys()), list(data.values())
    elif isinstance(data, list | tuple) and data and _is_source(data[0]):
        given = list(data)
        weights = [None] * len(given)
    if wrong := [i for i, source in enumerate(given) if not _is_source(source)]:
        raise ValueError(
            f"{name}[{wrong[0]}] is a {type(given[wrong[0]]).__name__}, but {name}[0] is a source;"
            " expected paths or iterables of dicts"
        )
    several = len(given) > 1
    return [
        _source(source, f"{name}[{i}]" if several else name, weight, several)
        for i, (source, weight) in enumerate(zip(given, weights, strict=True))
    ]


def _source(source: Any, name: str, weight: float | None, several: bool) -> Source:
    if isinstance(source, str | os.PathLike):
        try:
            files = _files(source)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        for file in files:
            if file.suffix in TABLE_SUFFIXES:
                require_pyarrow(file)
        return Source(str(source), tuple(files), None, weight, several)
    if type(source).__name__ == "DataFrame":  # iterating over one gives its columns
        rows = "to_dicts()" if hasattr(source, "to_dicts") else 'to_dict("records")'
        raise ValueError(f"{name} is a DataFrame; expected its rows: {name}=df.{rows}")
    return Source(name, (), source, weight, several)


def _files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that a path means: itself, those of the folder, or those that a glob matches."""
    found = Path(path)
    if found.is_dir():
        # Tools write folders named x.parquet, but none named x.jsonl: that is a mistaken link.
        if found.suffix in LINE_SUFFIXES:
            raise FileNotFoundError(f"{path} is a folder; expected a file.")
        return _folder_files(found)
    if not found.exists() and re.search(r"[*?\[]", str(path)):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise FileNotFoundError(f"{path}: no file matches this glob.")
        for file in files:
            _check_suffix(file)
        return files
    # A device or a pipe is refused by name when it is opened.
    if not found.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Rows are read from {_names()} files."
        )
    _check_suffix(found)
    return [found]


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    # `save_to_disk` of Hugging Face's datasets writes JSON about the .arrow files beside them.
    if (folder / "dataset_info.json").is_file() and any(p.suffix == ".arrow" for p in files):
        files = [p for p in files if p.suffix == ".arrow"]
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {_names()} file. For those in its folders, pass a glob such as"
            f" {folder}/**/*.parquet"
        )
    formats = sorted({p.suffix for p in files})
    names = [p.name.lower() for p in files]
    held_out = [p.name for p, name in zip(files, names, strict=True) if _HELD_OUT.search(name)]
    if held_out and len(held_out) < len(files):
        raise ValueError(
            f"{folder} holds rows to train on and rows to evaluate on ({held_out[0]}); choose the"
            f" files with a glob such as {folder}/train*{files[-1].suffix}"
        )
    if len(formats) > 1:
        raise ValueError(
            f"{folder} holds files of several formats ({', '.join(formats)}); choose with a glob"
            f" such as {folder}/*{formats[-1]}"
        )
    return files


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file whose name ends in {_names()}.")


def _names() -> str:
    return ", ".join(TABLE_SUFFIXES) + ", " + " or ".join(LINE_SUFFIXES)


def _file_rows(file: Path, skip_unreadable: bool, streamed: bool) -> Iterator[Any]:
    if file.suffix in LINE_SUFFIXES:
        return read_row_file(file, skip_unreadable=skip_unreadable, streamed=streamed)
    return read_table_file(file)


def _iterated(rows: Any) -> Iterator[Any]:
    """The rows of an object: pyarrow's, Hugging Face's, or any iterable."""
    if hasattr(rows, "to_batches"):
        return table_batches(rows.to_batches())
    if hasattr(rows, "features"):  # a Hugging Face data set, whose rows come from Arrow
        return map(without_nulls, rows)
    return iter(rows)
