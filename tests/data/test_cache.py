"""The cache: the same examples from the disk, for the same data and settings only."""

import json
import os
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from fastlora.data import cache
from fastlora.data.cache import cache_folder
from fastlora.data.encoding import RowLimits
from fastlora.data.reading import read_examples
from fastlora.text.tokenizer import Tokenizer
from oracles.data_rows import CHAT
from oracles.tokenizer_folders import llama3

ROWS = [{"text": f"The rank of {n}."} for n in range(20)]
ROWS += [{"messages": CHAT}, {"text": "rank " * 90}, {"txt": 1}]
LIMITS = RowLimits(64, too_long="drop", on_bad_row="skip")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(llama3(tmp_path_factory.mktemp("llama3")))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Data of any size are cached, in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST_TOKENS", 1)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Rows that were encoded, by call."""
    from fastlora.data import workers

    calls, encode = [], workers.encode_chunk
    counted = lambda rows, *rest: (calls.append(len(rows)), encode(rows, *rest))[1]
    monkeypatch.setattr(workers, "encode_chunk", counted)
    return calls


def files() -> list[Path]:
    return sorted(cache_folder().glob("*")) if cache_folder().exists() else []


def as_lists(examples):
    return [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]


def test_the_second_reading_encodes_nothing_and_tells_the_same(tokenizer, file, encoded):
    first, out = read_examples(file, tokenizer, LIMITS)
    again, told = read_examples(file, tokenizer, LIMITS)
    assert encoded == [len(ROWS)]
    assert as_lists(again) == as_lists(first)
    assert (out.lines(), out.listed, out.read) == (told.lines(), told.listed, told.read)
    assert out.rows.total() == 3
    assert all(e.input_ids.dtype == e.labels.dtype == np.int32 for e in again)
    base = again[0].input_ids
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap)  # no copy in memory


def test_weighted_sources_are_mixed_from_the_cache(tokenizer, file, encoded):
    data = {str(file): 3.0, (file.parent / "b.jsonl"): 1.0}
    (file.parent / "b.jsonl").write_text(json.dumps(ROWS[0]))
    first, out = read_examples(data, tokenizer, LIMITS, seed=1)
    again, told = read_examples(data, tokenizer, LIMITS, seed=1)
    other, _ = read_examples(data, tokenizer, LIMITS, seed=2)
    assert as_lists(again) == as_lists(first) and out.notes == told.notes
    assert len(other) == len(first) and sum(encoded) == len(ROWS) + 1


@pytest.mark.parametrize(
    "changed",
    [
        {"train_on": "all"},
        {"limits": LIMITS._replace(max_seq_length=32)},
        {"limits": LIMITS._replace(too_long="truncate")},
        {"columns": {"text": "body"}},
        {"name": "eval_data"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_are_encoded_anew(tokenizer, file, encoded, changed):
    read_examples(file, tokenizer, LIMITS)
    given = {"limits": LIMITS} | changed
    read_examples(file, tokenizer, **given)
    assert len(encoded) == 2 and len(files()) == 2


def test_changed_rows_are_encoded_anew_even_at_the_same_size_and_time(tokenizer, file, encoded):
    read_examples(file, tokenizer, LIMITS)
    status, text = file.stat(), file.read_text()
    file.write_text(text.replace("of 7.", "of 8."))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    read_examples(file, tokenizer, LIMITS)
    assert len(encoded) == 2


def test_another_tokenizer_template_or_variable_is_another_key(tokenizer, file, encoded):
    template = tokenizer.chat_templates["default"]
    text = template.text + "{# a comment #}{% if enable_thinking %}{% endif %}"
    chats = {"default": template._replace(text=text)}
    other = replace(tokenizer, chat_templates=chats)
    thinking = other.with_template_kwargs({"enable_thinking": True})
    for one in (tokenizer, tokenizer.with_tokens(["rank"]), other, thinking):
        read_examples(file, one, LIMITS)
        read_examples(file, one, LIMITS)
    assert len(encoded) == len(files()) == 4


def test_lists_of_dicts_are_cached_and_iterators_are_not(tokenizer, encoded):
    for _ in range(2):
        read_examples(ROWS, tokenizer, LIMITS)
    read_examples([*ROWS[1:], ROWS[0]], tokenizer, LIMITS)
    assert len(encoded) == len(files()) == 2
    for _ in range(2):
        read_examples(iter(ROWS), tokenizer, LIMITS)
    assert len(encoded) == 4 and len(files()) == 2


def test_small_data_write_no_file(tokenizer, file, monkeypatch):
    monkeypatch.setattr(cache, "LEAST_TOKENS", 2**20)
    read_examples(file, tokenizer, LIMITS)
    assert not files()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "cut":
            data = data[:-4]
        case "empty":
            data = b""
        case "longer":
            data += bytes(4)
        case "header":
            data[20] ^= 1
        case "id":
            data[-4] ^= 1
        case "length":
            data[8:16] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "longer", "header", "id", "length"])
def test_a_damaged_file_is_told_and_written_again(tokenizer, file, encoded, how):
    expected, _ = read_examples(file, tokenizer, LIMITS)
    (path,) = files()
    good = path.read_bytes()
    damage(path, how)
    with pytest.warns(UserWarning, match="damaged"):
        found, _ = read_examples(file, tokenizer, LIMITS)
    assert as_lists(found) == as_lists(expected)
    assert len(encoded) == 2 and path.read_bytes() == good


def test_a_folder_that_cannot_be_written_stops_no_run(tokenizer, file, tmp_path, monkeypatch):
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    with pytest.warns(UserWarning, match="not cached") as warned:
        examples, _ = read_examples(file, tokenizer, LIMITS)
    assert examples and len(warned) == 1


def test_a_full_disk_is_told_before_writing(tokenizer, file, monkeypatch):
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 1000)
    with pytest.warns(UserWarning, match="1,000 bytes free"):
        read_examples(file, tokenizer, LIMITS)
    assert not files()
