"""Arguments of train with a list of models: which may be lists, and what is refused by name."""

from pathlib import Path

import pytest

import fastlora
from fastlora.training.loop import train
from fastlora.training.many.arguments import own_arguments
from oracles.pairs import adapted
from oracles.training_runs import QUIET, ROWS, settings


@pytest.fixture(scope="module")
def models(base):
    return [adapted(base, seed=i, r=2, target_modules=["q_proj"]) for i in range(2)]


def given(models, tokenizer, **changed):
    """The arguments of train as it passes them on."""
    base = {name: getattr(settings(), name) for name in type(settings()).__slots__}
    others = dict(eval_data=None, output_dir=None, resume=False, log=None, progress=False)
    return base | others | dict(model=models, tokenizer=tokenizer, data=ROWS) | changed


def own(models, tokenizer, name, value):
    arguments, _ = own_arguments(given(models, tokenizer, **{name: value}))
    return [getattr(each, name) for each in arguments]


def test_a_list_of_rows_is_for_all_runs_and_a_list_of_sources_is_one_each(models, tokenizer):
    halves = [ROWS[:4], ROWS[4:]]
    assert own(models, tokenizer, "data", ROWS) == [ROWS, ROWS]
    assert own(models, tokenizer, "data", ROWS[:2]) == [ROWS[:2]] * 2
    assert own(models, tokenizer, "data", halves) == halves
    assert own(models, tokenizer, "data", [halves] * 2) == [halves] * 2
    assert own(models, tokenizer, "data", ["a.jsonl", {"b.jsonl": 1.0}]) == [
        "a.jsonl",
        {"b.jsonl": 1.0},
    ]
    assert own(models, tokenizer, "eval_data", [None, ROWS]) == [None, ROWS]


def test_an_iterator_is_read_once_for_all_runs(models, tokenizer):
    first, second = own(models, tokenizer, "data", iter(ROWS))
    assert first is second and first == ROWS
    together, _ = train(models, tokenizer, iter(ROWS), max_steps=1, **QUIET)
    assert len(together) == 2


def test_one_folder_stands_for_a_folder_for_each_run(models, tokenizer, tmp_path):
    folders = own(models, tokenizer, "output_dir", tmp_path)
    assert folders == [tmp_path / "run-0", tmp_path / "run-1"]
    two = [tmp_path / "a", str(tmp_path / "b")]
    assert own(models, tokenizer, "output_dir", two) == [*map(Path, two)]


WRONG = {
    "learning_rate is a list of 3 for 2 models": dict(learning_rate=[1e-3] * 3),
    "data is a list of 3 for 2 models": dict(data=[ROWS, ROWS, ROWS]),
    "batch_size=[1, 2]: all models share it": dict(batch_size=[1, 2]),
    "packing=[True, False]: all models share it": dict(packing=[True, False]),
    "run 1: learning_rate=-1.0: expected": dict(learning_rate=[1e-3, -1.0]),
    "loss='dpo': several models": dict(loss="dpo"),
    "resume='run/checkpoint-3': a checkpoint is of one run": dict(resume="run/checkpoint-3"),
    "output_dir has": dict(output_dir=["same", "./same"]),
    "log='wandb' has one run in a process": dict(log="wandb"),
    "early_stopping is a function of evaluations; give eval_every": dict(
        early_stopping=lambda losses: [], eval_data=ROWS
    ),
    "give one eval_every": dict(
        early_stopping=lambda losses: [], eval_data=ROWS, eval_every=[1, 2]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused_is_named(models, tokenizer, message, monkeypatch):
    monkeypatch.setattr("fastlora.training.logging.open.extra_module", lambda *_: None)
    with pytest.raises(ValueError) as refused:
        own_arguments(given(models, tokenizer, **WRONG[message]))
    assert message in str(refused.value)


def test_what_every_run_has_wrong_is_said_once(models, tokenizer):
    with pytest.raises(ValueError) as refused:
        train(models, tokenizer, ROWS, warmup_ratio=7.0, learning_rate=[0.0, 1e-3], progress=False)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert sum("warmup_ratio" in line for line in lines) == 1
    assert any("run 0: learning_rate" in line for line in lines)


def test_models_that_cannot_be_stacked_are_refused(base, models, tokenizer):
    dora = fastlora.lora(base, r=2, use_dora=True, target_modules=["q_proj"])
    for wrong, word in ((dora, "use_dora"), (base, "no adapter")):
        with pytest.raises(ValueError, match=word):
            train([models[0], wrong], tokenizer, ROWS, **QUIET)
    for nothing in ([], [3]):
        with pytest.raises(ValueError, match="model"):
            own_arguments(given(nothing, tokenizer))


def test_a_list_of_values_for_one_model_is_refused(models, tokenizer):
    with pytest.raises(ValueError, match="learning_rate"):
        train(models[0], tokenizer, ROWS, learning_rate=[1e-3], **QUIET)
