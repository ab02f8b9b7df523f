"""The examples of fastlora/losses/README.md run, and give the losses of the records for train."""

from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import losses
from oracles.readme_code import run_python_blocks

README = Path(losses.__file__).parent / "README.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> dict:
    """All names that the README's code defines."""
    return run_python_blocks(README, tmp_path_factory.mktemp("readme"))


RECORDS = {
    "dpo": lambda names: losses.DPO(reference=None),
    "orpo": lambda names: losses.ORPO(),
    "simpo": lambda names: losses.SimPO(beta=2.0),
    "kto": lambda names: losses.KTO(reference=None),
    "dft": lambda names: losses.DFT(),
    "distill": lambda names: losses.Distill(teacher=names["teacher"], beta=0.0),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_example_by_hand_is_what_train_minimises(name, example):
    model, record = example["model"], RECORDS[name](example)
    batch = example["kto_batch" if name == "kto" else "batch"]
    value, grads = fastlora.value_and_grad(example[name])(model.adapter)
    wanted = record.loss_sum(model.adapter, model.base, model.spec, batch, None)
    torch.testing.assert_close(value, wanted / record.count(batch))
    assert any(x.b.any() for x in grads["layers"][0].values())


def test_grpo_at_the_sampling_policy_is_minus_the_advantages_mean(example):
    value, _ = fastlora.value_and_grad(example["grpo"])(example["model"].adapter)
    weights = example["advantages"] * example["tokens"]
    torch.testing.assert_close(value, -weights.sum() / example["tokens"].sum())
