"""sources_of(): files, folders, globs, iterables and mixtures, before a row is read."""

import json
from pathlib import Path

import pytest

from fastlora.data.rows import read_rows
from fastlora.data.sources import sources_of
from fastlora.errors import CheckpointError


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(data) -> list[str]:
    return [row["text"] for row in read_rows(data)]


def test_a_folder_gives_its_files_in_order_and_not_those_of_its_folders(tmp_path):
    write(tmp_path / "b.jsonl", "b")
    write(tmp_path / "a.jsonl", "a", "A")
    write(tmp_path / "more/c.jsonl", "c")
    (tmp_path / "README.md").write_text("# rows")
    assert texts(tmp_path) == texts(str(tmp_path)) == ["a", "A", "b"]
    assert texts(tmp_path / "*.jsonl") == ["a", "A", "b"]
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a", "A", "b", "c"]
    assert texts([tmp_path / "b.jsonl", tmp_path / "more"]) == ["b", "c"]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path):
    assert texts(write(tmp_path / "a[1].jsonl", "a")) == ["a"]


def test_iterables_and_files_together(tmp_path):
    rows = [{"text": "b"}]
    assert texts([write(tmp_path / "a.jsonl", "a"), rows, iter([{"text": "c"}])]) == ["a", "b", "c"]


class Dataset:
    """As a Hugging Face data set: rows from Arrow, with null for keys that others have."""

    def __init__(self):
        self.features = {"text": "string", "messages": "list"}

    def __len__(self):
        return 2

    def __iter__(self):
        yield {"text": "a", "messages": None}
        yield {"text": None, "messages": [{"role": "user", "content": "b", "name": None}]}


def test_data_sets_of_hugging_face_are_read_without_nulls():
    (source,) = sources_of(Dataset(), "data")
    assert source.count == 2
    assert read_rows(Dataset()) == [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "b"}]},
    ]


def test_a_data_frame_is_refused_with_the_call_that_gives_its_rows():
    frame = pytest.importorskip("pandas").DataFrame({"text": ["a", "b"]})
    past_hook = getattr(sources_of, "__wrapped__", sources_of)
    with pytest.raises(ValueError, match=r'data=df\.to_dict\("records"\)'):
        past_hook(frame, "data")
    assert read_rows(frame.to_dict("records")) == [{"text": "a"}, {"text": "b"}]


def test_rows_of_several_files_are_named_with_their_file(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{"txt": "c"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, row 2: keys \['txt'\]"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match=r"data\[1\], row 1: keys \['txt'\]"):
        read_rows([tmp_path / "a.jsonl", [{"txt": "c"}]])


def test_folders_that_mix_splits_or_formats_are_refused(tmp_path):
    write(tmp_path / "a/train.jsonl", "a")
    write(tmp_path / "a/test-00000.jsonl", "b")
    with pytest.raises(ValueError, match=r"evaluate on \(test-00000\.jsonl\)"):
        sources_of(tmp_path / "a", "data")
    write(tmp_path / "b/one.jsonl", "a")
    write(tmp_path / "b/two.json", "b")
    with pytest.raises(ValueError, match=r"several formats \(\.json, \.jsonl\)"):
        sources_of(tmp_path / "b", "data")
    write(tmp_path / "c/latest.jsonl", "a")
    write(tmp_path / "c/devices.jsonl", "b")
    assert texts(tmp_path / "c") == ["b", "a"]


def test_what_cannot_be_found_is_named_before_anything_is_read(tmp_path):
    for missing, why in (
        (tmp_path / "no.jsonl", r"no\.jsonl: no such file"),
        (tmp_path / "no/rows", "rows: no such file or folder"),
        (tmp_path / "no*.jsonl", "no file matches"),
        (tmp_path, "holds no"),
    ):
        with pytest.raises(FileNotFoundError, match=why):
            sources_of([iter([]), missing], "data")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        sources_of(tmp_path / "folder.jsonl", "data")
    (tmp_path / "rows.txt").touch()
    for name in ("rows.txt", "*.txt"):
        with pytest.raises(ValueError, match=r"rows\.txt: expected a file whose name ends in"):
            sources_of(tmp_path / name, "data")
    with pytest.raises(ValueError, match=r"data\[1\] is a dict"):
        getattr(sources_of, "__wrapped__", sources_of)(["a.jsonl", {"text": "a"}], "data")


def test_lines_that_are_not_json_can_be_read_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n\n{"text": "b"}\n')
    (source,) = sources_of(tmp_path / "a.jsonl", "data")
    rows = list(source.rows(skip_unreadable=True))
    assert [place for place, _ in rows] == ["row 1", "row 2", "row 3"]
    assert rows[1][1].reason.startswith("line 2: ")
    assert rows[2][1] == {"text": "b"}
    with pytest.raises(CheckpointError, match="line 2"):
        list(source.rows(skip_unreadable=False))
