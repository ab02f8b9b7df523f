"""read_rows(): files and iterables, and the rows that it refuses."""

import json

import pytest

from fastlora.data.rows import read_rows
from fastlora.errors import CheckpointError
from oracles.data_rows import CHAT


def test_rows_come_from_jsonl_json_and_iterables_alike(tmp_path):
    rows = [
        {"messages": CHAT},
        {"prompt": "a", "completion": "b\u2028c", "id": 3},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"instruction": "a", "input": None, "output": "b", "text": "whole"},
        {"text": "straße"},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines + "\r\n", encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert read_rows(str(tmp_path / "rows.json")) == rows
    assert read_rows(iter(rows)) == rows


def test_every_bad_row_is_named_with_its_keys():
    bad = [
        {"conversations": [], "id": 1},
        "text",
        {"messages": []},
        {"messages": [{"content": "x"}]},
        {"prompt": "x", "completion": 3},
        {"prompt": CHAT, "completion": "x"},
        {"instruction": "x", "output": None},
        {"text": 7},
        {"messages": CHAT, "tools": [{}]},
    ]
    with pytest.raises(ValueError) as error:
        read_rows(iter([{"text": "fine"}, *bad]))  # of a list the tests' type hook tries one item
    for number, why in enumerate(
        [
            "keys ['conversations', 'id']",
            "a str, not a dict",
            "at least one message",
            "message 1 has no role",
            "completion is a int",
            "completion must be a list",
            "output is a NoneType",
            "text is a int",
            "tools",
        ],
        start=2,
    ):
        assert f"row {number}: " in str(error.value) and why in str(error.value)
    assert "row 1:" not in str(error.value)


def test_a_missing_file_or_one_that_is_not_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"\.jsonl or \.json"):
        read_rows(tmp_path / "rows.csv")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\nnonsense\n')
    with pytest.raises(CheckpointError, match=r"(?s)rows\.jsonl.*line 3: .*line 5: "):
        read_rows(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_rows(path)
    (tmp_path / "rows.json").write_text('{"text": "a"}')
    with pytest.raises(CheckpointError, match="a list of objects"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="no rows"):
        read_rows([])
