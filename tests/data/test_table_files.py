"""Parquet, Arrow and CSV files give the rows of the same JSONL file."""

import importlib.util
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import csv, feather, parquet

from fastlora.data import table_files
from fastlora.data.rows import read_rows
from fastlora.data.sources import sources_of
from fastlora.errors import CheckpointError

ROWS = [
    {"prompt": 'a,\n"b"', "completion": " straße 🙂", "n": "007"},
    {"prompt": "", "completion": "NULL", "n": "1.50"},
    {"prompt": "x" * 3_000_000, "completion": "a block of a CSV file is longer", "n": ""},
]
CALLS = [
    {"function": {"name": "add", "arguments": {"a": 1}}},
    {"function": {"name": "sing", "arguments": {"song": "b"}}},
]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    for call in CALLS
]


def write(path: Path, rows: list[dict]) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    match path.suffix:
        case ".parquet":
            parquet.write_table(table, path, row_group_size=2)
        case ".feather":
            feather.write_feather(table, path)
        case ".arrow":  # the stream format of Hugging Face's datasets
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case _:
            options = csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
            csv.write_csv(table, path, options)
    return path


@pytest.mark.parametrize("suffix", table_files.TABLE_SUFFIXES)
def test_every_format_gives_the_rows_that_were_written(tmp_path, suffix):
    assert read_rows(write(tmp_path / f"rows{suffix}", ROWS)) == ROWS


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow"])
def test_a_call_has_no_arguments_of_other_calls(tmp_path, suffix):
    table = pyarrow.Table.from_pylist(CHATS).to_pylist()
    assert "song" in table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert read_rows(write(tmp_path / f"rows{suffix}", CHATS)) == CHATS


def test_messages_in_csv_are_json(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "rows.csv", [{"messages": json.dumps(chat)}])
    assert read_rows(path) == [{"messages": chat}]


def test_tables_and_folders_of_datasets_are_read(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    assert read_rows(table) == ROWS
    for i in range(2):
        write(tmp_path / f"data-0000{i}-of-00002.arrow", ROWS)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    assert read_rows(tmp_path) == ROWS * 2


@pytest.mark.parametrize("suffix", table_files.TABLE_SUFFIXES)
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b'a,b\tc\n1,"\xff' + b"2,3\n" * 3)
    with pytest.raises((CheckpointError, ValueError), match=rf"rows\{suffix}"):
        read_rows(path)


def test_an_arrow_file_that_was_cut_off_is_named(tmp_path):
    for suffix in (".parquet", ".feather", ".arrow"):
        path = write(tmp_path / f"rows{suffix}", ROWS)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(CheckpointError, match=rf"rows\{suffix} cannot be read"):
            read_rows(path)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").touch()
    find = importlib.util.find_spec
    missing = lambda name, *more: None if name == "pyarrow" else find(name, *more)
    monkeypatch.setattr(table_files, "find_spec", missing)
    with pytest.raises(ModuleNotFoundError, match=r"rows\.parquet.*pip install -e .\.\[data\]"):
        sources_of(tmp_path / "rows.parquet", "data")
