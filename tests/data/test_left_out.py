"""Rows that are too long or bad are counted and reported."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastlora.data.encoding import RowLimits, encode_rows
from fastlora.data.left_out import REPORT_FILE, report
from fastlora.data.reading import read_examples
from fastlora.ops.loss.ignore import IGNORE
from fastlora.text.tokenizer import Tokenizer
from oracles.data_rows import CHAT
from oracles.tokenizer_folders import llama3

LONG = {"prompt": "What is a rank?", "completion": " The number of independent rows." * 5}
GOOD = {"text": "The rank."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(llama3(tmp_path_factory.mktemp("llama3")))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def whole(tokenizer):
    (example,) = encode_rows([LONG], tokenizer, max_seq_length=4096)
    return example


def test_dropped_rows_are_counted(tokenizer, whole, capfd):
    rows = [GOOD, LONG, GOOD]
    examples = encode_rows(rows, tokenizer, max_seq_length=40, too_long="drop")
    assert len(examples) == 2
    out, err = capfd.readouterr()
    t = len(whole.input_ids)
    assert out == ""
    assert f"rows: 3 rows read\n  1 dropped: longer than max_seq_length=40 ({t} tokens)\n" in err


def test_truncated_rows_keep_their_first_tokens(tokenizer, whole, capfd):
    (cut,) = encode_rows([LONG], tokenizer, max_seq_length=32, too_long="truncate")
    assert cut.input_ids.tolist() == whole.input_ids[:32].tolist()
    assert cut.labels.tolist() == whole.labels[:32].tolist()
    cut_tokens = len(whole.input_ids) - 32
    err = capfd.readouterr().err
    assert f"1 truncated: longer than max_seq_length=32 ({cut_tokens} tokens)" in err


def test_a_truncated_row_without_a_reply_is_dropped_and_counted(tokenizer, whole, capfd):
    first = int(np.flatnonzero(whole.labels != IGNORE)[0])
    rows = [GOOD, LONG]
    examples = encode_rows(rows, tokenizer, max_seq_length=first, too_long="truncate")
    assert len(examples) == 1
    assert f"dropped: no token to train within max_seq_length={first}" in capfd.readouterr().err


@pytest.mark.parametrize("length", [3, 8, 31])
def test_split_rows_train_the_same_tokens(tokenizer, whole, length):
    pieces = encode_rows([LONG], tokenizer, max_seq_length=length, too_long="split")
    assert all(len(piece.input_ids) <= length for piece in pieces)
    assert all(piece.labels[0] == IGNORE and (piece.labels != IGNORE).any() for piece in pieces)
    trained = [piece.labels[piece.labels != IGNORE] for piece in pieces]
    assert np.concatenate(trained).tolist() == whole.labels[whole.labels != IGNORE].tolist()


def test_text_is_cut_only_if_that_is_asked_for(tokenizer, capfd):
    text = {"text": LONG["completion"]}
    encode = lambda **how: encode_rows([text], tokenizer, max_seq_length=16, split_text=True, **how)
    assert len(encode()) > 2
    assert capfd.readouterr().err == ""
    assert len(encode(too_long="truncate")) == 1
    assert "1 truncated" in capfd.readouterr().err


def test_bad_rows_are_skipped_and_counted_by_reason(tokenizer, capfd):
    rows = [
        GOOD,
        {"txt": "a"},
        {"prompt": "a", "completion": ""},
        {"text": "\ud800"},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    (example,) = encode_rows(rows, tokenizer, max_seq_length=64, on_bad_row="skip")
    (alone,) = encode_rows(rows[:1], tokenizer, max_seq_length=64)
    assert example.input_ids.tolist() == alone.input_ids.tolist()
    err = capfd.readouterr().err
    assert "5 rows read" in err
    for reason in (
        "2 skipped: no token to train",
        "1 skipped: not a row of a known kind",
        "1 skipped: refused by the tokenizer or its chat template",
    ):
        assert reason in err
    assert "row 2: " in err and "keys ['txt']" in err
    assert "no token to train: no token" not in err


def test_skipping_bad_rows_does_not_skip_long_ones(tokenizer):
    with pytest.raises(ValueError, match=r"row 1: \d+ tokens, \d+ more than max_seq_length"):
        encode_rows([LONG], tokenizer, max_seq_length=16, on_bad_row="skip")


def test_the_report_lists_every_row_with_its_place_and_reason(tokenizer, tmp_path, capfd):
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in (GOOD, LONG, {"txt": "a"})]
    data.write_text("\n".join([*lines, "{", json.dumps(GOOD)]))
    limits = RowLimits(32, too_long="drop", on_bad_row="skip")
    examples, left_out = read_examples(data, tokenizer, limits)
    assert len(examples) == 2
    report([left_out], tmp_path / "out")
    listed = (tmp_path / "out" / REPORT_FILE).read_text().splitlines()
    entries = [json.loads(line) for line in listed]
    places = [(entry["data"], entry["place"]) for entry in entries]
    assert places == [("data", "row 2"), ("data", "row 3"), ("data", "row 4")]
    assert any("line 4" in entry["detail"] for entry in entries)
    assert str(tmp_path / "out" / REPORT_FILE) in capfd.readouterr().err


def test_nothing_is_told_or_written_if_nothing_is_left_out(tokenizer, tmp_path, capfd):
    _, left_out = read_examples([GOOD], tokenizer, RowLimits(32))
    report([left_out], tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


def test_data_of_which_nothing_is_left_are_refused_with_the_counts(tokenizer):
    limits = RowLimits(32, too_long="drop")
    with pytest.raises(ValueError, match=r"(?s)no row is left.*1 dropped: longer"):
        read_examples([LONG], tokenizer, limits)


def test_many_rows_are_encoded_as_one_by_one(tokenizer):
    """Several chunks, and rows of which each asks the tokenizer several times."""
    rows = [
        [{"text": f"The {n}"}, {"prompt": "The ra", "completion": f"nk {n}"}, {"messages": CHAT}][
            n % 3
        ]
        for n in range(1200)
    ]
    together = encode_rows(rows, tokenizer, max_seq_length=256)
    assert len(together) == len(rows)
    for row, example in list(zip(rows, together, strict=True))[::97]:
        (alone,) = encode_rows([row], tokenizer, max_seq_length=256)
        assert alone.input_ids.tolist() == example.input_ids.tolist()
        assert alone.labels.tolist() == example.labels.tolist()


def test_ids_and_labels_have_32_bits(tokenizer):
    (example,) = encode_rows([GOOD], tokenizer, max_seq_length=64)
    assert example.input_ids.dtype == example.labels.dtype == np.int32


def test_a_bar_counts_rows_from_the_first_one(tokenizer, capfd):
    read_examples([GOOD] * 3, tokenizer, RowLimits(32), progress=True)
    err = capfd.readouterr().err
    assert "encoding data" in err and "3/3" in err and "tokens=" in err


def test_sources_are_mixed_by_weight_and_told(tokenizer, tmp_path):
    paths: list[Path] = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, n in zip(paths, (30, 10), strict=True):
        path.write_text((json.dumps({"text": path.stem}) + "\n") * n)
    data = {paths[0]: 0.25, paths[1]: 0.75}
    examples, left_out = read_examples(data, tokenizer, RowLimits(32), seed=1)
    texts = [tokenizer.decode(example.input_ids.tolist()) for example in examples]
    assert (texts.count("a"), texts.count("b")) == (10, 30)
    assert f"  {paths[0]}: 10 examples an epoch (25.0%), from 30" in left_out.lines()
    with pytest.raises(ValueError, match=r"b\.jsonl holds no rows"):
        paths[1].write_text("")
        read_examples(data, tokenizer, RowLimits(32))
