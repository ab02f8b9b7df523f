"""find_learning_rate: a range test, whose trial run changes nothing."""

import itertools
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.training import rate_range as rates
from fastlora.training.logging.figures import smooth
from fastlora.training.rate_range import exponential, find_learning_rate, rate_range
from oracles.training_runs import ROWS


def records(losses, low=1e-5, high=1.0) -> list[dict]:
    factor = exponential(low, high)
    return [
        {"learning_rate": high * factor(i, len(losses)), "loss": loss}
        for i, loss in enumerate(losses)
    ]


def test_rates_rise_by_one_factor_from_low_to_high():
    found = [r["learning_rate"] for r in records([0.0] * 51)]
    assert (found[0], found[-1]) == (pytest.approx(1e-5), 1.0)
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert ratios == pytest.approx([ratios[0]] * 50)


def test_the_suggestion_is_where_the_loss_falls_fastest():
    """A logistic fall around 1e-3, then divergence at 1e-1."""
    logs = [math.log10(r["learning_rate"]) for r in records([0.0] * 200)]
    losses = [4 - 2 / (1 + math.exp(-4 * (x + 3))) + max(0.0, x + 1) * 50 for x in logs]
    found = rate_range(records(losses), smoothing=0.0)
    assert abs(math.log10(found.suggestion) + 3) < 0.05
    # The average comes after the loss, so its steepest point lies at a higher rate.
    assert 1e-3 < rate_range(records(losses), smoothing=0.9).suggestion < 1e-2


def test_averages_have_no_bias_to_zero():
    assert smooth([3.0] * 20, 0.9) == pytest.approx([3.0] * 20)
    assert smooth([1.0, 2.0], 0.5) == pytest.approx([1.0, (0.25 + 1.0) / 0.75])


def test_a_loss_that_only_rises_has_no_suggestion():
    with pytest.raises(ValueError, match="the loss fell at no rate"):
        rate_range(records([float(i) for i in range(50)]), 0.5)


QUICK = dict(low=1e-4, steps=40, batch_size=10, packing=False, progress=False)


def test_the_trial_ends_at_overflow_and_leaves_the_model(model, tokenizer, tmp_path):
    before = [leaf.clone() for leaf in tree_leaves(model.adapter)]
    found = fastlora.find_learning_rate(model, tokenizer, ROWS, high=1e30, **QUICK)
    assert len(found.rates) < 40, "rates near 1e30 overflow"
    assert found.suggestion in found.rates
    assert all(map(torch.equal, before, tree_leaves(model.adapter)))
    found.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_trial_ends_when_the_loss_has_risen(model, tokenizer, monkeypatch):
    """The logits of a random model are bounded, so any loss counts as risen here."""
    monkeypatch.setattr(rates, "_DIVERGED", 0.5)
    found = fastlora.find_learning_rate(model, tokenizer, ROWS, high=0.1, **QUICK)
    assert len(found.rates) == 5, "a tenth of the steps is always run"


def test_bad_arguments_are_refused_together(model, tokenizer):
    call = getattr(find_learning_rate, "__wrapped__", find_learning_rate)
    with pytest.raises(ValueError, match=r"low=1: expected less than high=0\.1") as error:
        call(model, tokenizer, ROWS, low=1, high=0.1, learning_rate=1e-3, colour=3)
    assert "learning_rate: the range test sets it itself" in str(error.value)
    assert "colour is not a setting" in str(error.value)
    with pytest.raises(ValueError, match=r"steps=3: expected"):
        call(model, tokenizer, ROWS, steps=3)
