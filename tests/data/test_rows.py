"""read_rows(): files and iterables, and the rows that it refuses."""

import json
import os

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
        {"dialog": [], "id": 1},
        "text",
        {"messages": []},
        {"messages": [{"content": "x"}]},
        {"prompt": "x", "completion": 3},
        {"prompt": CHAT, "completion": "x"},
        {"instruction": "x", "output": None},
        {"text": 7},
        {"text": "a", "tools": [{}]},
    ]
    with pytest.raises(ValueError) as error:
        read_rows(iter([{"text": "fine"}, *bad]))  # of a list the tests' type hook tries one item
    for number, why in enumerate(
        [
            "keys ['dialog', 'id']",
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


def test_pairs_of_replies_are_told_their_losses():
    with pytest.raises(ValueError, match=r"row 1: keys .*for loss=\"dpo\""):
        read_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def test_a_missing_file_or_one_that_is_not_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_rows(tmp_path / "no.jsonl")
    (tmp_path / "rows.txt").touch()
    with pytest.raises(ValueError, match=r"\.jsonl or \.json"):
        read_rows(tmp_path / "rows.txt")
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


def write(path, text: str):
    path.write_text(text)
    return path


def test_json_lines_under_the_name_of_json_are_read(tmp_path):
    rows = [{"text": "a\u2028b"}, {"text": "{}"}, {"messages": CHAT}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for text in (lines, lines + "\n", "\ufeff" + lines.replace("\n", "\r\n"), "\n" + lines):
        assert read_rows(write(tmp_path / "rows.json", text)) == rows
    with pytest.raises(CheckpointError, match=r"(?s)rows\.json: .*line 2: "):
        read_rows(write(tmp_path / "rows.json", '{"text": "a"}\n{"text": \n{"text": "b"}'))


DEEP = '{"text": "a", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (DEEP, "nested too deeply"),
        ('{"text": "a", "id": 1%s}' % ("0" * 400), "an integer of 401 digits"),
        ('{"text": "a", "id": %s}' % ("1" * 5000), "an integer of 5,000 digits"),
        ('{"text": "a", "text": "b"}', "given twice: ['text']"),
        ('{"messages": [{"role": "user", "role": "assistant", "content": ""}]}', "given twice"),
        ('{"text": "\x1b[2J"}', "control character"),
    ],
)
def test_rows_are_read_as_strictly_as_a_models_files(tmp_path, row, why):
    for name, text in (
        ("rows.jsonl", f'{{"text": "a"}}\n{row}\n'),
        ("rows.json", f'[{{"text": "a"}},\n{row}]'),
    ):
        with pytest.raises(CheckpointError) as error:
            read_rows(write(tmp_path / name, text))
        assert why in str(error.value) and name in str(error.value)
        assert "\x1b" not in str(error.value)
        assert name == "rows.json" or "line 2" in str(error.value)


def test_large_numbers_that_a_float_holds_are_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", f'{{"text": "a", "id": {2**127}}}')
    assert read_rows(path) == [{"text": "a", "id": 2**127}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_size_of_a_file_is_asked_before_it_is_read(tmp_path, name):
    path = write(tmp_path / name, '{"text": "a"}')
    os.truncate(path, 50 * 10**9)  # sparse: it takes no space
    with pytest.raises(CheckpointError, match=rf"{name} has 50,000,000,000 bytes"):
        read_rows(path)
