"""Schedules beyond those of test_step.py, and schedules that are functions."""

import pytest
import torch
import transformers

from fastlora.training.loop import train
from fastlora.training.schedules import learning_rate_factor, schedule_identity
from oracles.training_runs import QUIET, ROWS, Killed, long_run, stop_at, timeless
from oracles.trees import same_bits

# Name, our options, transformers' function, its arguments.
PEERS = {
    "floor": (
        "cosine", {"min_lr_rate": 0.1}, "get_cosine_with_min_lr_schedule_with_warmup",
        {"min_lr_rate": 0.1},
    ),
    "restarts": (
        "cosine_with_restarts", {"num_cycles": 3},
        "get_cosine_with_hard_restarts_schedule_with_warmup", {"num_cycles": 3},
    ),
    "one restart": (
        "cosine_with_restarts", {}, "get_cosine_with_hard_restarts_schedule_with_warmup", {},
    ),
    "wsd": ("wsd", {"num_decay_steps": 4}, "get_wsd_schedule", {"num_decay_steps": 4}),
    "wsd, linear, floor": (
        "warmup_stable_decay",
        {"num_decay_steps": 6, "decay_type": "linear", "min_lr_ratio": 0.2},
        "get_wsd_schedule", {"num_decay_steps": 6, "decay_type": "linear", "min_lr_ratio": 0.2},
    ),
    "wsd, 1-sqrt": (
        "wsd", {"num_decay_steps": 5, "decay_type": "1-sqrt"},
        "get_wsd_schedule", {"num_decay_steps": 5, "decay_type": "1-sqrt"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 7), (3, 20)])
def test_schedules_are_those_of_transformers(name, warmup_steps, steps):
    scheduler, options, function, given = PEERS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = getattr(transformers.optimization, function)(
        optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps, **given
    )
    for index in range(steps):
        ours = learning_rate_factor(scheduler, index, warmup_steps, steps, options)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15), index
        optimizer.step()
        theirs.step()


def test_wsd_decays_in_the_last_tenth():
    factors = [learning_rate_factor("wsd", i, 2, 20) for i in range(20)]
    assert factors[:3] == [0, 0.5, 1] and set(factors[2:19]) == {1.0}
    assert factors[19] == pytest.approx(0.5)
    assert learning_rate_factor("wsd", 0, 0, 1) == 1, "one step is a decay of one step"


def test_a_function_is_the_whole_schedule(model, tokenizer):
    asked = []
    schedule = lambda index, steps: asked.append((index, steps)) or 2.0**-index
    run = dict(max_steps=3, learning_rate=1e-3, progress=False)
    _, history = train(model, tokenizer, ROWS, lr_scheduler=schedule, **run)
    assert history.learning_rates == (1e-3, 5e-4, 2.5e-4)
    assert asked == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(ValueError, match=r"lr_scheduler\(0, 3\) returned -1.*>= 0"):
        train(model, tokenizer, ROWS, lr_scheduler=lambda *_: -1.0, **run)


@pytest.mark.parametrize(
    "given",
    [
        dict(lr_scheduler="wsd", lr_scheduler_kwargs={"num_decay_steps": 3}),
        dict(lr_scheduler=lambda index, steps: 1 - index / steps),
    ],
)
def test_a_resumed_run_has_the_same_schedule(dropping, tokenizer, tmp_path, given):
    whole, history = long_run(dropping, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, again = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter) and timeless(again) == timeless(history)
    with pytest.raises(ValueError, match=r"lr_scheduler: .* there, .* now"):
        long_run(dropping, tokenizer, tmp_path / "cut", resume=True, lr_scheduler=lambda *_: 1.0)


def test_two_functions_are_told_apart_by_their_values():
    one, same, other = (lambda i, n: 1 / (i + 1)), (lambda i, n: (i + 1) ** -1), lambda i, n: 1.0
    assert schedule_identity(one, 5000) == schedule_identity(same, 5000)
    assert schedule_identity(one, 5000) != schedule_identity(other, 5000)
    assert schedule_identity("cosine", 3) == "cosine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(lr_scheduler_kwargs={"min_lr": 1}), r"has \['min_lr'\].*'cosine': min_lr_rate"),
        (dict(lr_scheduler_kwargs={"min_lr_rate": 2}), "min_lr_rate=2: expected a number from 0"),
        (dict(lr_scheduler="linear", lr_scheduler_kwargs={"x": 1}), "for 'linear': nothing"),
        (dict(lr_scheduler=lambda *_: 1, lr_scheduler_kwargs={"x": 1}), "means nothing"),
    ],
)
def test_options_that_a_schedule_lacks_are_refused(model, tokenizer, given, message):
    with pytest.raises(ValueError, match=f"lr_scheduler_kwargs.*{message}"):
        train(model, tokenizer, ROWS, **given, **QUIET)
