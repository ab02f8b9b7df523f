"""train() on streams: the run that resumes reads the rows that the other would have read."""

import json
import threading

import pytest

from fastlora.data import lanes, streams
from fastlora.data.left_out import REPORT_FILE
from fastlora.training.checkpoint import STATE_FILE
from fastlora.training.logging.backends import RUN_RECORD
from fastlora.training.loop import train
from fastlora.training.positions import DATA_POSITION
from oracles.training_runs import QUIET, ROWS, Killed, stop_at, timeless
from oracles.trees import same_bits

GIVEN = dict(max_steps=9, batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, **QUIET)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_TOKENS", 300)
    monkeypatch.setattr(streams, "_LEAST_SEQUENCES", 1)
    monkeypatch.setattr(lanes, "CHUNK_ROWS", 5)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "STREAM_BYTES", 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*ROWS, {"txt": 1}])))
    return path


def test_a_run_that_resumes_has_the_same_bits(model, tokenizer, file, tmp_path, capfd):
    given = GIVEN | dict(on_bad_row="skip")
    expected, history = train(model, tokenizer, file, **given)
    folder = tmp_path / "out"
    given |= dict(output_dir=folder, save_every=2)
    with pytest.raises(Killed):
        train(model, tokenizer, file, log=stop_at(6), **given)
    (folder / "checkpoint-6" / STATE_FILE).unlink(missing_ok=True)  # steps 5 and 6 come again
    logged = []
    trained, resumed = train(model, tokenizer, file, resume=True, log=logged.append, **given)
    assert same_bits(trained.adapter, expected.adapter)
    assert timeless(resumed) == timeless(history)
    assert [record["step"] for record in logged] == [5, 6, 7, 8, 9]
    assert not any(DATA_POSITION in record for record in logged)
    assert "skipped: not a row of a known kind" in capfd.readouterr().err
    assert (folder / REPORT_FILE).is_file()
    data = json.loads((folder / RUN_RECORD).read_text())["data"]
    assert data["streamed"] and data["sequences"] == 36


def test_other_rows_at_the_beginning_are_refused(model, tokenizer, file, tmp_path):
    file.write_text("\n".join(map(json.dumps, ROWS)))
    given = GIVEN | dict(output_dir=tmp_path / "out", save_every=2)
    train(model, tokenizer, file, **given)
    file.write_text(file.read_text().replace("0:", "1:"))
    with pytest.raises(ValueError, match="hash of the training data"):
        train(model, tokenizer, file, **given, resume=True)


def test_the_number_of_steps_must_be_given(model, tokenizer, file):
    with pytest.raises(ValueError, match="max_steps"):
        train(model, tokenizer, file, **GIVEN | dict(max_steps=None))


def test_private_runs_are_refused_before_threads_read_a_stream(model, tokenizer, file):
    given = GIVEN | dict(
        clip_per_example=1.0, noise_multiplier=1.0, gradient_accumulation_steps=1, packing=False
    )
    with pytest.raises(ValueError, match="streamed, but clip_per_example"):
        train(model, tokenizer, file, **given)
    assert not [x.name for x in threading.enumerate() if x.name.startswith("fastlora")]


def test_a_column_that_no_row_of_the_first_block_has_is_refused(model, tokenizer, file):
    with pytest.raises(ValueError, match="no row of data has 'txet'"):
        train(model, tokenizer, file, columns={"text": "txet"}, on_bad_row="skip", **GIVEN)


def test_preferences_are_not_streamed(model, tokenizer, file):
    with pytest.raises(ValueError, match=r"rows of preferences, which loss=dpo.*take"):
        train(model, tokenizer, file, **GIVEN, loss="dpo")


def test_a_bad_row_ends_the_run_and_its_state_is_kept(model, tokenizer, file, tmp_path):
    file.write_text("\n".join(map(json.dumps, [*ROWS * 8, {"txt": 1}])))
    given = GIVEN | dict(max_steps=500, output_dir=tmp_path / "out", packing=False)
    with pytest.raises(ValueError, match="row 81: keys") as caught:
        train(model, tokenizer, file, **given)
    done = len(caught.value.history.steps)
    assert (tmp_path / "out" / f"checkpoint-{done}" / STATE_FILE).is_file()
