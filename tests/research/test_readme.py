"""The examples of fastlora/research/README.md run, and give what its text says."""

from pathlib import Path

import pytest
import torch

from fastlora import research
from oracles.readme_code import run_python_blocks

README = Path(research.__file__).parent / "README.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> dict:
    """All names that the README's code defines."""
    return run_python_blocks(README, tmp_path_factory.mktemp("readme"))


def test_an_eigenvector_is_one(example):
    along = research.ravel(example["product"](example["sharpest"]))
    value, vector = example["values"][0], research.ravel(example["sharpest"])
    assert (along - value * vector).norm() <= 0.05 * abs(value)


def test_predictions_are_probabilities_and_samples_run_as_a_stack(example):
    torch.testing.assert_close(example["p"].sum(-1), torch.ones(4))
    assert example["logits"].shape[:2] == (32, example["ids"].shape[1])
    assert example["best"].shape == (2,) and example["step"].any()


def test_the_resolved_spec_differs_inside_of_a_transform(example, capsys):
    example["loss"](example["adapter"])
    torch.func.grad(example["loss"])(example["adapter"])
    assert capsys.readouterr().out.split() == ["selective", "none"]


def test_every_public_function_is_in_the_readme():
    text = README.read_text()
    assert not [name for name in research.__all__ if f"{name}" not in text]
