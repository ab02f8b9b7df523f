"""The values of train(loss=...): names, records, functions, and everything else."""

import pytest
import torch

import fastlora
from fastlora import functional as FL
from fastlora import losses
from fastlora.losses.loss_argument import LOSS, FromFunction, objective_of


def test_a_name_a_record_and_a_function_are_objectives(model):
    assert objective_of("sft", model) is None
    assert isinstance(objective_of("simpo", model), losses.SimPO)
    record = losses.ORPO(beta=0.3)
    assert objective_of(record, model) is record
    found = objective_of(FL.loss_sum, model)
    assert isinstance(found, FromFunction) and found.describe().endswith("functional.loss_sum")


def test_the_description_tells_settings_apart(model):
    assert losses.DPO(beta=0.1).describe() != losses.DPO(beta=0.2).describe()
    assert losses.DPO().describe() == losses.DPO().describe()
    assert losses.ORPO(beta=0.3).describe() == "orpo(beta=0.3)"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (FL.loss_sum, "returned a tuple: expected a tensor without"),
        (lambda *given, seed: None, "returned a NoneType: expected a tensor without"),
        (lambda *given, seed: torch.zeros(3), r"returned \(3,\)"),
        (lambda *given, seed: FL.loss_sum(*given)[0].detach(), "without a gradient"),
        (lambda *given, seed: torch.zeros(()), "without a gradient"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(model, loss, message):
    ids = torch.ones(1, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    step = fastlora.value_and_grad(objective_of(loss, model).loss_sum)
    with pytest.raises(ValueError, match=message):
        step(model.adapter, model.base, model.spec, batch, None)


@pytest.mark.parametrize("value", ["distill", "ppo", None, 3, losses.DPO, (losses.DPO(),)])
def test_the_rule_of_loss_refuses_everything_else(value):
    assert not LOSS.accepts(value)
