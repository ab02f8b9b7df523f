"""Arguments of train() that concern data: each reaches the encoder, and nothing is lost unsaid."""

import json

import pytest

from fastlora.data.left_out import REPORT_FILE
from fastlora.training.loop import train
from oracles.training_runs import LENGTHS, QUIET, ROWS
from oracles.trees import same_bits

LONG = {"prompt": "a", "completion": " b" * 200}
RENAMED = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]
COLUMNS = {"prompt": "question", "completion": "answer"}


def test_files_lists_and_renamed_columns_give_the_same_bits(model, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, RENAMED)))
    given = dict(num_epochs=1, batch_size=4, packing=False, **QUIET)
    expected, _ = train(model, tokenizer, ROWS, **given)
    for data in (tmp_path / "rows.jsonl", [RENAMED[:3], RENAMED[3:]], tmp_path / "*.jsonl"):
        trained, _ = train(model, tokenizer, data, columns=COLUMNS, **given)
        assert same_bits(trained.adapter, expected.adapter)


def test_a_column_that_no_row_has_is_refused(model, tokenizer, tmp_path):
    """Else a text beside the prompt would be trained on, without a word."""
    rows = [row | {"text": "id 17"} for row in RENAMED]
    wrong = {"prompt": "questoin", "completion": "answer"}
    given = dict(batch_size=1, **QUIET)
    with pytest.raises(ValueError, match=r"no row of data has 'questoin' \(prompt\).*'question'"):
        train(model, tokenizer, rows, columns=wrong, **given)
    assert train(model, tokenizer, rows, eval_data=ROWS[:2], columns=COLUMNS, max_steps=1, **given)


def test_what_is_left_out_is_told_and_listed(model, tokenizer, tmp_path, capfd):
    rows = [*ROWS, LONG, {"txt": "a"}]
    given = dict(packing=False, batch_size=1, too_long="drop", on_bad_row="skip", **QUIET)
    _, history = train(model, tokenizer, rows, output_dir=tmp_path / "out", **given)
    assert len(history.steps) == len(LENGTHS)
    err = capfd.readouterr().err
    assert "data: 12 rows read" in err
    assert "1 dropped: longer than max_seq_length=64" in err
    assert "1 skipped: not a row of a known kind" in err
    lines = (tmp_path / "out" / REPORT_FILE).read_text().splitlines()
    assert [json.loads(line)["place"] for line in lines] == ["row 11", "row 12"]


def test_weighted_sources_repeat_and_are_told(model, tokenizer, tmp_path, capfd):
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {str(tmp_path / "a.jsonl"): 0.5, str(tmp_path / "b.jsonl"): 0.5}
    given = dict(packing=False, batch_size=1, **QUIET)
    _, history = train(model, tokenizer, data, **given)
    assert len(history.steps) == 10
    assert "a.jsonl: 5 examples an epoch (50.0%), from 2" in capfd.readouterr().err
    again, _ = train(model, tokenizer, data, **given)
    other, _ = train(model, tokenizer, data, **given, seed=1)
    assert not same_bits(again.adapter, other.adapter)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("too_long", "cut"),
        ("on_bad_row", "drop"),
        ("train_on", "last"),
        ("columns", {"question": "prompt"}),
        ("columns", ["prompt"]),
        ("template_kwargs", {"messages": []}),
        ("template_kwargs", {"no_such_variable": 1}),
        ("data", {"a.jsonl": 0}),
        ("data", {"a.jsonl": -1.0}),
        ("data", {}),
        ("data", {"train": ROWS}),
    ],
)
def test_bad_values_are_refused_by_name(model, tokenizer, name, value):
    given = dict(model=model, tokenizer=tokenizer, data=ROWS) | {name: value}
    with pytest.raises(ValueError, match=name):
        getattr(train, "__wrapped__", train)(**given)
