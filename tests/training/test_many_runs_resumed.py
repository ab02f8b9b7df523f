"""Several runs: their folders, resuming, ending early, failing, and the log."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.model import Model
from fastlora.training.history import History
from fastlora.training.loop import train
from oracles.pairs import adapted
from oracles.training_runs import LONG, ROWS, Killed, timeless
from oracles.trees import relative_error, same_bits

OWN = dict(learning_rate=[1e-2, 3e-3], seed=[1, 2])


@pytest.fixture(scope="module")
def models(base) -> list[Model]:
    how = dict(lora_dropout=0.2, target_modules=["q_proj", "down_proj"])
    return [adapted(base, seed=i, r=2 + i, **how) for i in range(2)]


def run(models, tokenizer, folder=None, **changed):
    given = LONG | OWN | dict(output_dir=folder, eval_data=ROWS[:3]) | changed
    return train(models, tokenizer, given.pop("data", ROWS), **given)


@pytest.fixture(scope="module")
def whole(models, tokenizer, tmp_path_factory):
    """(output_dir, models, histories) of runs that were not interrupted, with a log."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(models, tokenizer, folder, log="jsonl")


def kill(run_number: int, step: int):
    def log(record: dict) -> None:
        if (record["run"], record["step"]) == (run_number, step):
            raise Killed

    return log


def same_runs(models, histories, whole) -> bool:
    _, expected, of_expected = whole
    equal = [same_bits(a.adapter, b.adapter) for a, b in zip(models, expected, strict=True)]
    return all(equal) and [*map(timeless, histories)] == [*map(timeless, of_expected)]


# ── folders ──


def test_each_folder_holds_what_a_single_run_leaves(whole, models, tokenizer, tmp_path):
    folder, trained, _ = whole
    own = {name: values[1] for name, values in OWN.items()}
    run(models[1], tokenizer, tmp_path / "alone", log="jsonl", **own)
    files = lambda at: sorted(str(p.relative_to(at)) for p in at.rglob("*"))
    assert files(folder / "run-1") == files(tmp_path / "alone")
    tensors = load_file(folder / "run-1/adapter_model.safetensors")
    alone = load_file(tmp_path / "alone/adapter_model.safetensors")
    assert {k: x.shape for k, x in tensors.items()} == {k: x.shape for k, x in alone.items()}
    read = fastlora.load_adapter(fastlora.disable(models[1]), folder / "run-1")
    assert same_bits(read.adapter, trained[1].adapter)
    records = [json.loads(line) for line in (folder / "run-1/log.jsonl").open()]
    assert len(records) == 6 and "run" not in records[0]
    saved = json.loads((folder / "run-1/run.json").read_text())
    assert saved["settings"]["seed"] == 2 and saved["result"]["steps"] == 6


def test_a_single_run_goes_on_from_the_checkpoint_of_one_of_several(whole, models, tokenizer):
    folder, trained, histories = whole
    own = {name: values[0] for name, values in OWN.items()}
    alone, history = run(
        models[0], tokenizer, **own, resume=folder / "run-0/checkpoint-4", save_every=None
    )
    assert relative_error(alone.adapter, trained[0].adapter) < 1e-3
    assert history.losses == pytest.approx(histories[0].losses, rel=1e-5)


# ── resuming ──


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resumed_runs_have_the_same_bits(whole, models, tokenizer, tmp_path, resume):
    with pytest.raises(Killed):
        run(models, tokenizer, tmp_path, log=kill(1, 4))
    assert not (tmp_path / "run-0/adapter_model.safetensors").exists()
    assert same_runs(*run(models, tokenizer, tmp_path, resume=resume), whole)


def test_runs_go_on_from_different_steps(whole, models, tokenizer, tmp_path):
    with pytest.raises(Killed):
        run(models, tokenizer, tmp_path, log=kill(1, 4))
    state = tmp_path / "run-1/checkpoint-4/trainer_state.json"
    state.unlink()  # as if the run was killed before it was written
    resumed, histories = run(models, tokenizer, tmp_path, resume="auto")
    for mine, model, other in zip(histories, resumed, whole[1], strict=True):
        assert mine.steps == (1, 2, 3, 4, 5, 6)
        assert relative_error(model.adapter, other.adapter) < 1e-3


def test_auto_starts_runs_that_have_no_checkpoint(whole, models, tokenizer, tmp_path):
    assert same_runs(*run(models, tokenizer, tmp_path, resume="auto"), whole)
    # Runs that have ended are restored as they are.
    assert same_runs(*run(models, tokenizer, tmp_path, resume=True), whole)


def test_a_signal_saves_every_run(models, tokenizer, tmp_path, whole):
    def interrupt(record: dict) -> None:
        if (record["run"], record["step"]) == (0, 3):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        run(models, tokenizer, tmp_path, log=interrupt)
    assert [history.steps[-1] for history in stopped.value.histories] == [3, 3]
    assert len(stopped.value.trained_models) == 2
    for i in range(2):
        assert (tmp_path / f"run-{i}/checkpoint-3/trainer_state.json").is_file()
    assert same_runs(*run(models, tokenizer, tmp_path, resume=True), whole)


# ── runs that end early ──


def test_early_stopping_and_the_best_adapter_are_each_runs_own(models, tokenizer):
    """Run 1 does not move, so its first evaluation is its best."""
    how = dict(save_every=None, weight_decay=0.0, early_stopping=1, keep_best=True, eval_every=1)
    trained, histories = run(models, tokenizer, **how, learning_rate=[1e-2, 1e-30])
    assert len(histories[1].steps) == 2 < len(histories[0].steps)
    assert histories[1].eval_losses[0] == histories[1].eval_losses[1]
    best = min(histories[0].eval_losses)
    alone, history = run(models[0], tokenizer, **how, learning_rate=1e-2, seed=1)
    assert best == pytest.approx(min(history.eval_losses), rel=1e-5)
    assert histories[0].steps == history.steps
    assert relative_error(trained[0].adapter, alone.adapter) < 1e-3
    assert relative_error(trained[1].adapter, models[1].adapter) < 1e-6


def halve(losses):
    return sorted(losses, key=lambda number: losses[number][-1])[(len(losses) + 1) // 2 :]


def test_successive_halving_ends_the_worse_half(base, tokenizer, tmp_path):
    four = [adapted(base, seed=i, r=2, target_modules=["q_proj"]) for i in range(4)]
    own = dict(learning_rate=[1e-3] * 4, seed=7, early_stopping=halve, max_steps=8)
    seen = []
    how = own | dict(log=lambda record: seen.append(record["run"]))
    _, histories = run(four, tokenizer, tmp_path, **how)
    lengths = sorted(len(history.steps) for history in histories)
    assert lengths == [2, 2, 4, 8]
    longest = max(histories, key=lambda h: len(h.steps))
    for history in histories:
        last = len(history.eval_losses) - 1
        assert longest.eval_losses[last] <= history.eval_losses[last]
    assert seen.count(0) == len(histories[0].steps)
    # The runs that ended stay as they are when the list resumes.
    _, again = run(four, tokenizer, tmp_path, resume=True, **own)
    assert [*map(timeless, again)] == [*map(timeless, histories)]


def test_halving_goes_on_where_it_was_killed(base, tokenizer, tmp_path):
    four = [adapted(base, seed=i, r=2, target_modules=["q_proj"]) for i in range(4)]
    own = dict(learning_rate=[1e-3] * 4, seed=7, early_stopping=halve, max_steps=8)
    _, expected = run(four, tokenizer, tmp_path / "whole", **own)
    best = max(range(4), key=lambda i: len(expected[i].steps))
    with pytest.raises(Killed):
        run(four, tokenizer, tmp_path / "cut", log=kill(best, 6), **own)
    _, resumed = run(four, tokenizer, tmp_path / "cut", resume=True, **own)
    assert [*map(timeless, resumed)] == [*map(timeless, expected)]


@pytest.mark.parametrize("answer", [None, [9], ["0"], "0"])
def test_a_function_that_names_no_runs_is_refused(models, tokenizer, answer):
    with pytest.raises(ValueError, match="early_stopping returned"):
        run(models, tokenizer, save_every=None, early_stopping=lambda losses: answer)


# ── failing ──


def test_a_run_that_is_not_finite_is_named_and_the_others_go_on(models, tokenizer, tmp_path):
    own = dict(learning_rate=[1e-2, 1e30], weight_decay=0.0, eval_data=None, eval_every=None)
    alone, history = run(
        models[0], tokenizer, tmp_path / "alone", **own | dict(learning_rate=1e-2, seed=1)
    )
    with pytest.raises(FloatingPointError, match=r"^run 1: step [23]: the loss is") as failed:
        run(models, tokenizer, tmp_path / "both", **own)
    error = failed.value
    assert "The other 1 of 2 runs went on" in str(error)
    assert error.histories[0].losses == pytest.approx(history.losses, rel=1e-5)
    assert 1 <= len(error.histories[1].steps) < 6
    assert relative_error(error.trained_models[0].adapter, alone.adapter) < 1e-3
    assert (tmp_path / "both/run-0/adapter_model.safetensors").is_file()
    steps = len(error.histories[1].steps)
    assert (tmp_path / f"both/run-1/checkpoint-{steps}").is_dir()
    assert any(f"checkpoint-{steps}" in note for note in error.__notes__)


def test_a_broken_adapter_is_found_at_the_first_step(models, tokenizer):
    broken = models[1].with_adapter(
        {"layers": tuple({n: r._replace(a=torch.full_like(r.a, torch.nan)) for n, r in x.items()}
                         for x in models[1].adapter["layers"])}
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"run 1: step 1.*adapter's tensor") as failed:
        run([models[0], broken], tokenizer, save_every=None)
    assert isinstance(failed.value.histories[1], History)
    assert not failed.value.histories[1].steps


def test_an_error_in_the_users_function_keeps_every_run(models, tokenizer, tmp_path):
    def log(record: dict) -> None:
        if (record["run"], record["step"]) == (0, 3):
            raise RuntimeError("full")

    with pytest.raises(RuntimeError) as failed:
        run(models, tokenizer, tmp_path, log=log)
    notes = "\n".join(failed.value.__notes__)
    assert "run 0: " in notes and "run 1: " in notes and "checkpoint-3" in notes


# ── the bar ──


def test_one_bar_shows_the_mean_and_the_best_loss(models, tokenizer, capfd):
    run(models, tokenizer, save_every=None, progress=True)
    _, err = capfd.readouterr()
    assert all(word in err for word in ("6/6", "best=", "loss=", "runs=2 of 2", "eval="))
