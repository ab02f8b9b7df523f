"""Optimizers that a function of the user's makes."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastlora.training.checkpoint import complete_checkpoints
from fastlora.training.custom_optimizer import optimizer_identity, trial_problems
from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, Killed, long_run, stop_at, timeless
from oracles.trees import relative_error, same_bits

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "nadam": torch.optim.NAdam,
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True, betas=(0.8, 0.9)),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
}


def test_a_factory_of_adamw_is_the_named_optimizer(model, tokenizer):
    run = dict(max_steps=3, batch_size=4, weight_decay=0.1, learning_rate=1e-3, **QUIET)
    named, history = train(model, tokenizer, ROWS, **run)
    made, again = train(model, tokenizer, ROWS, optimizer=torch.optim.AdamW, **run)
    assert same_bits(made.adapter, named.adapter) and timeless(again) == timeless(history)


def test_a_step_of_sgd_is_the_gradient(model, tokenizer):
    run = dict(max_steps=1, learning_rate=0.5, optimizer=torch.optim.SGD, **QUIET)
    records: list[dict] = []
    trained, history = train(model, tokenizer, ROWS, max_grad_norm=None, log=records.append, **run)
    moved = [
        a - b for a, b in zip(*map(tree_leaves, (trained.adapter, model.adapter)), strict=True)
    ]
    norm = torch.nn.utils.get_total_norm(moved).item()
    assert norm == pytest.approx(0.5 * history.grad_norms[0], rel=1e-4)
    assert records[0]["update_norm/A"] == pytest.approx(0.5 * records[0]["grad_norm/A"], rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_resumes_with_the_same_bits(dropping, tokenizer, tmp_path, name, stop):
    given = dict(optimizer=OPTIMIZERS[name])
    whole, history = long_run(dropping, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, tmp_path / "cut", log=stop_at(stop), **given)
    resumed, again = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)
    assert timeless(again) == timeless(history)
    assert relative_error(whole.adapter, dropping.adapter) > 1e-6


def test_the_state_after_an_error_is_saved_though_sgd_counts_no_steps(
    dropping, tokenizer, tmp_path
):
    def broken(record: dict) -> None:
        if record["step"] == 3:
            raise KeyError("mine")

    given = dict(optimizer=torch.optim.SGD, save_every=100)
    with pytest.raises(KeyError):
        long_run(dropping, tokenizer, tmp_path / "cut", log=broken, **given)
    assert [*complete_checkpoints(tmp_path / "cut")] == [3]
    whole, _ = long_run(dropping, tokenizer, tmp_path / "whole", **given)
    resumed, _ = long_run(dropping, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter)


def test_a_nonfinite_gradient_is_not_applied(model, tokenizer):
    with pytest.raises(FloatingPointError, match="step 2") as error:
        train(
            model, tokenizer, ROWS, max_steps=3, learning_rate=1e30, optimizer=torch.optim.Adagrad,
            **QUIET,
        )  # fmt: skip
    assert len(error.value.history.steps) == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_another_optimizer_is_another_run(dropping, tokenizer, tmp_path):
    long_run(dropping, tokenizer, tmp_path, optimizer=torch.optim.NAdam, max_steps=4)
    other = partial(torch.optim.NAdam, betas=(0.5, 0.9))
    with pytest.raises(ValueError, match=r"optimizer: .*NAdam\(.* there, .*NAdam\(.* now"):
        long_run(dropping, tokenizer, tmp_path, optimizer=other, max_steps=4, resume=True)
    assert optimizer_identity(torch.optim.NAdam) == optimizer_identity(partial(torch.optim.NAdam))


def test_an_optimizer_that_takes_matrices_only_has_an_identity():
    assert optimizer_identity(torch.optim.Muon).startswith("torch.optim")


class CountsInItsGroups(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda groups: 3, "returned 3: expected a torch.optim.Optimizer"),
        (lambda _: torch.optim.SGD([torch.zeros(1)]), "trains other tensors"),
        (torch.optim.LBFGS, "LBFGS failed on a trial step"),
        (CountsInItsGroups, "keeps state in its parameter groups"),
    ],
)
def test_unusable_optimizers_are_refused_before_the_data_is_read(
    model, tokenizer, factory, message
):
    assert len(trial_problems(factory, tree_leaves(model.adapter))) == 1
    with pytest.raises(ValueError, match=message):
        train(model, tokenizer, "no.jsonl", optimizer=factory, **QUIET)
