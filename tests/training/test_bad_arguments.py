"""Bad arguments of train, plan and History: each is refused by name, before any work."""

import dataclasses
from collections.abc import Callable
from time import process_time
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import fastlora
from oracles.training_runs import ROWS

VALUES: dict[str, Any] = {
    "None": None,
    "a tuple": (1, 2),
    "a text": "hot",
    "a float": 1.5,
    "a list": [3],
    "an object": object(),
    "a tensor": torch.zeros(3),
    "a flag": True,
}

# Argument -> the values above that it accepts by their type. Everything else must be refused.
TRAIN = {
    "model": set(),
    "tokenizer": set(),
    "data": {"a text"},
    "eval_data": {"None", "a text"},
    "output_dir": {"None", "a text"},
    "max_steps": {"None"},
    "num_epochs": {"a float"},
    "batch_size": set(),
    "gradient_accumulation_steps": set(),
    "learning_rate": {"a float"},
    "learning_rates": {"None"},
    "lr_scheduler": set(),
    "lr_scheduler_kwargs": {"None"},
    "warmup_ratio": set(),
    "weight_decay": {"a float"},
    "max_grad_norm": {"None", "a float"},
    "optimizer": set(),
    "packing": {"a flag"},
    "train_on": set(),
    "too_long": set(),
    "on_bad_row": set(),
    "columns": {"None"},
    "template_kwargs": {"None"},
    "eval_every": {"None"},
    "save_every": {"None"},
    "keep": {"None"},
    "keep_best": {"a flag"},
    "early_stopping": {"None"},
    "neftune_alpha": {"None", "a float"},
    "clip_per_example": {"None", "a float"},
    "noise_multiplier": {"None", "a float"},
    "context_parallel": set(),
    "resume": {"a text", "a flag"},
    "seed": set(),
    "log": {"None"},
    "progress": {"a flag"},
}
PLAN = {
    "model": set(),
    "batch_size": set(),
    "seq_length": set(),
    "memory": set(),
    "optimizer": set(),
    "card": set(),
}
COLUMNS = {field.name: {"a tuple"} for field in dataclasses.fields(fastlora.History)}


def bad(accepted: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [(name, value) for name in accepted for value in VALUES if value not in accepted[name]]


def refuses(function: Callable[..., Any], argument: str, arguments: dict[str, Any]) -> str:
    """Call the function, past the type hook if the tests have one; returns the error message."""
    started = process_time()
    with pytest.raises((ValueError, TypeError)) as refused:
        getattr(function, "__wrapped__", function)(**arguments)
    assert process_time() - started < 1
    # The hook checks a class and read_rows, which looks at the rows, before our own checks do.
    if function in (fastlora.train, fastlora.plan) and argument not in ("data", "eval_data"):
        assert not isinstance(refused.value, TypeCheckError)
    assert argument in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("argument", "value"), bad(TRAIN))
def test_train_refuses_a_bad_argument_by_name(model, tokenizer, tmp_path, argument, value):
    good = dict(model=model, tokenizer=tokenizer, data=ROWS, output_dir=tmp_path / "out")
    refuses(fastlora.train, argument, good | {argument: VALUES[value]})
    assert not (tmp_path / "out").exists()


def test_train_names_the_cure_of_common_slips(model, tokenizer):
    good = dict(model=model, tokenizer=tokenizer, data=ROWS)
    pair = refuses(fastlora.train, "model", good | dict(model=(model, tokenizer)))
    assert "model, tokenizer = fastlora.load(...)" in pair
    name = refuses(fastlora.train, "tokenizer", good | dict(tokenizer="demo"))
    assert "tokenizer" in name and "'demo'" in name
    splits = refuses(fastlora.train, "data", good | dict(data={"train": ROWS}))
    assert "data={'train'" in splits
    missing = refuses(fastlora.train, "tokenizer", good | dict(tokenizer=None))
    assert "tokenizer.json" in missing


@pytest.mark.parametrize(("argument", "value"), bad(PLAN))
def test_plan_refuses_a_bad_argument_by_name(model, argument, value):
    good = dict(model=model, batch_size=1, seq_length=8, memory="24GB")
    refuses(fastlora.plan, argument, good | {argument: VALUES[value]})


@pytest.mark.parametrize(("argument", "value"), bad(COLUMNS))
def test_history_refuses_a_bad_column_by_name(argument, value):
    good = dict.fromkeys(COLUMNS, (1, 2))
    assert fastlora.History(**good).steps == (1, 2)
    refuses(fastlora.History, argument, good | {argument: VALUES[value]})


@pytest.mark.parametrize("value", [None, "hot", 1.5, [3], [{}], [{"step": 1, "loss": "low"}]])
def test_history_of_refuses_bad_records(value):
    refuses(lambda records: fastlora.History.of(records), "records", dict(records=value))
