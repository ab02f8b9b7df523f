"""read_table_file(): rows of Parquet, Arrow and CSV files, read in batches by pyarrow."""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastlora.checkpoints.json_text import first_line
from fastlora.data.row_forms import without_nulls
from fastlora.errors import CheckpointError, lacks_extra

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".csv", ".tsv")

# Rows that are Python objects at a time. pyarrow's default of 131,072 would take gigabytes.
_BATCH_ROWS = 1024

# pyarrow's default of 1 MiB refuses a CSV row that is longer. Two blocks are in memory.
_CSV_BLOCK_BYTES = 64 * 2**20


def read_table_file(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, as dicts by the names of the columns.

    Keys whose value is null are left out (`without_nulls`). All values of a CSV file are texts; its
    first line has the names, and the values may hold line breaks in quotes.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        CheckpointError: the file is damaged; names it.
    """
    require_pyarrow(path)
    import pyarrow  # noqa: PLC0415  an extra; takes 90 ms

    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file.")
    read = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(path.suffix, _arrow)
    try:
        yield from table_batches(read(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error):.500}") from error


def require_pyarrow(path: Path) -> None:
    """Raise ModuleNotFoundError, with the cure, if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise lacks_extra(f"{path}: reading {path.suffix} files", "pyarrow", "data")


def table_batches(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of pyarrow's record batches, without nulls."""
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from map(without_nulls, batch.slice(start, _BATCH_ROWS).to_pylist())


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet  # noqa: PLC0415

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow(path: Path) -> Iterator[Any]:
    """Arrow's file format, or its stream format, which Hugging Face's datasets writes."""
    import pyarrow  # noqa: PLC0415

    with path.open("rb") as file:
        is_file_format = file.read(6) == b"ARROW1"
    with pyarrow.memory_map(str(path)) as source:
        if is_file_format:
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(source)


def _csv(path: Path) -> Iterator[Any]:
    from pyarrow import csv, string  # noqa: PLC0415

    read = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    parse = csv.ParseOptions(
        delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
    )
    with csv.open_csv(path, read_options=read, parse_options=parse) as reader:
        names = reader.schema.names
    # Without this, a column of numbers would be numbers, and an empty text a null.
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, string()), strings_can_be_null=False
    )
    options = {"read_options": read, "parse_options": parse, "convert_options": convert}
    with csv.open_csv(path, **options) as reader:
        yield from reader
