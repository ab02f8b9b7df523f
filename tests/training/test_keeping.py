"""keep, keep_best and early_stopping."""

import shutil
from pathlib import Path

import pytest

import fastlora
from fastlora.errors import CheckpointError
from fastlora.training import after_step
from fastlora.training.checkpoint import complete_checkpoints
from fastlora.training.keeping import best_step, stops_early
from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, Killed, long_run, stop_at, timeless
from oracles.trees import same_bits


def steps(folder: Path) -> list[int]:
    return [*complete_checkpoints(folder)]


@pytest.fixture
def losses_are(monkeypatch):
    """Evaluations with given losses: step -> loss."""

    def use(losses: dict[int, float]) -> None:
        monkeypatch.setattr(after_step, "evaluate", lambda run, model, step: losses[step])

    return use


def evaluated(*losses: float) -> list[dict]:
    return [{"step": i + 1, "eval_loss": loss} for i, loss in enumerate(losses)]


def test_the_best_step_is_the_first_of_the_lowest():
    assert best_step([]) is None
    assert best_step([{"step": 1}]) is None
    assert best_step([{"step": 1}, {"step": 2, "eval_loss": 3.0}]) == 2
    assert best_step(evaluated(3.0, 1.0, 2.0, 1.0)) == 2


def test_patience_counts_evaluations_without_improvement():
    assert not stops_early(evaluated(3.0, 4.0, 4.0), None)
    assert not stops_early(evaluated(3.0, 4.0), 2)
    assert stops_early(evaluated(3.0, 4.0, 3.0), 2), "an equal loss is no improvement"
    assert not stops_early(evaluated(3.0, 4.0, 2.0), 2)
    assert not stops_early([{"step": 1}], 1)


def test_keep_leaves_the_newest(dropping, tokenizer, tmp_path):
    long_run(dropping, tokenizer, tmp_path, save_every=1, keep=2)
    assert steps(tmp_path) == [5, 6]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_run_that_keeps_one_checkpoint_resumes(dropping, tokenizer, tmp_path):
    whole, history = long_run(dropping, tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "cut", log=stop_at(4), save_every=1, keep=1)
    assert steps(tmp_path / "cut") == [4]
    resumed, again = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, keep=1)
    assert same_bits(resumed.adapter, whole.adapter) and timeless(again) == timeless(history)
    assert steps(tmp_path / "cut") == [6]


LOSSES = {2: 3.0, 4: 1.0, 6: 2.0}


@pytest.mark.parametrize("saved", [True, False])
def test_the_best_adapter_is_returned_and_saved(dropping, tokenizer, tmp_path, losses_are, saved):
    at_4, _ = long_run(dropping, tokenizer, tmp_path / "plain")
    at_4 = fastlora.load_adapter(dropping, tmp_path / "plain/checkpoint-4")
    losses_are(LOSSES)
    folder = tmp_path / "best" if saved else None
    given = {} if saved else dict(save_every=None)
    trained, history = long_run(dropping, tokenizer, folder, keep_best=True, **given)  # type: ignore[arg-type]
    assert same_bits(trained.adapter, at_4.adapter)
    assert len(history.steps) == 6, "the history is that of the whole run"
    if folder is not None:
        assert same_bits(fastlora.load_adapter(dropping, folder).adapter, at_4.adapter)


def test_the_best_checkpoint_is_spared_and_superseded_ones_go(
    dropping, tokenizer, tmp_path, losses_are
):
    losses_are({1: 5.0, 2: 3.0, 3: 4.0, 4: 1.0, 5: 2.0, 6: 2.0})
    given = dict(keep_best=True, eval_every=1)
    long_run(dropping, tokenizer, tmp_path / "a", save_every=1, keep=1, **given)
    assert steps(tmp_path / "a") == [4, 6]
    long_run(dropping, tokenizer, tmp_path / "b", save_every=3, **given)
    assert steps(tmp_path / "b") == [3, 4, 6], "1 and 2 were saved as the best only"
    long_run(dropping, tokenizer, tmp_path / "c", save_every=None, **given)
    assert steps(tmp_path / "c") == [4]


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_resumed_run_knows_the_best_adapter(dropping, tokenizer, tmp_path, losses_are, stop):
    losses_are(LOSSES)
    given = dict(keep_best=True, save_every=1, keep=1)
    whole, history = long_run(dropping, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "cut", log=stop_at(stop), **given)
    resumed, again = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter) and timeless(again) == timeless(history)
    # A run that has ended resumes to its result.
    ended, _ = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(ended.adapter, whole.adapter)


def test_a_run_that_goes_on_in_another_folder_takes_its_best_checkpoint_along(
    dropping, tokenizer, tmp_path, losses_are
):
    losses_are(LOSSES)
    given = dict(keep_best=True, save_every=1)
    whole, _ = long_run(dropping, tokenizer, tmp_path / "whole", **given)
    best, last = tmp_path / "whole/checkpoint-4", tmp_path / "whole/checkpoint-5"
    assert best.is_dir()
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "b", resume=last, log=stop_at(6), **given)
    shutil.rmtree(tmp_path / "whole")
    resumed, _ = long_run(dropping, tokenizer, tmp_path / "b", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)


def test_a_missing_best_checkpoint_is_reported(dropping, tokenizer, tmp_path, losses_are):
    losses_are({2: 1.0, 4: 2.0, 6: 2.0})
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path, log=stop_at(4), keep=1)
    with pytest.raises(CheckpointError, match="checkpoint-2, of the step with the lowest"):
        long_run(dropping, tokenizer, tmp_path, resume=True, keep_best=True)


def test_a_run_stops_early_and_resumes_to_the_same_result(
    dropping, tokenizer, tmp_path, losses_are
):
    losses_are({1: 3.0, 2: 2.0, 3: 4.0, 4: 3.0})
    given = dict(early_stopping=2, eval_every=1, save_every=5, keep_best=True)
    records: list[dict] = []
    trained, history = long_run(dropping, tokenizer, tmp_path, log=records.append, **given)
    assert history.steps == (1, 2, 3, 4) and len(records) == 4
    assert steps(tmp_path) == [2, 4], "the last step is saved"
    again, same = long_run(dropping, tokenizer, tmp_path, resume=True, **given)
    assert same_bits(again.adapter, trained.adapter) and same == history
    losses_are({5: 1.0, 6: 1.5})
    patient, longer = long_run(
        dropping, tokenizer, tmp_path, resume=True, **given | dict(early_stopping=9)
    )
    assert len(longer.steps) == 6 and not same_bits(patient.adapter, trained.adapter)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(keep=1), "keep=1 without output_dir"),
        (dict(keep_best=True), "keep_best=True without eval_data"),
        (dict(early_stopping=2, eval_data=ROWS), "early_stopping=2 without eval_every"),
    ],
)
def test_arguments_without_their_companions_are_refused(model, tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        train(model, tokenizer, ROWS, **given, **QUIET)
