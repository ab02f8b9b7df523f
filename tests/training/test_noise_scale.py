"""The gradient noise scale: unbiased estimates, and its figures in a history."""

import math

import pytest
import torch

from fastlora.training.loop import train
from fastlora.training.noise_scale import noise_figures, noise_scale
from oracles.training_runs import QUIET, ROWS


def test_estimates_are_without_bias():
    """Gradients of tokens drawn around a known mean, with a known covariance."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(30, generator=g, dtype=torch.float64)
    counts, trials, deviation = [4, 7, 5], 4000, 2.0
    noise = deviation * torch.randn(trials, sum(counts), 30, generator=g, dtype=torch.float64)
    tokens = mean + noise
    pieces = [piece.mean(1).square().sum(1) for piece in tokens.split(counts, 1)]
    whole = tokens.mean(1).square().sum(1)
    found = [noise_figures([p[i] for p in pieces], whole[i], counts) for i in range(trials)]
    for name, true in (("gradient_signal", mean.square().sum()), ("gradient_noise", 30 * 4.0)):
        values = torch.stack([figures[name] for figures in found])
        assert (values.mean() - true).abs() < 4 * values.std() / math.sqrt(trials), name
    estimate = noise_scale(*([float(f[name]) for f in found] for name in found[0]))
    assert estimate == pytest.approx(120 / mean.square().sum().item(), rel=0.05)


def test_a_mean_signal_that_is_not_positive_gives_infinity():
    assert noise_scale([-1.0, 0.5], [2.0, 2.0]) == math.inf


def test_a_history_has_it_for_steps_of_several_micro_batches(exact, tokenizer):
    """By hand from the gradients of the first step's micro-batches; the updates do not change."""
    run = dict(max_steps=2, packing=False, learning_rate=1e-3, **QUIET)
    seen = []
    _, history = train(
        exact, tokenizer, ROWS, batch_size=3, gradient_accumulation_steps=2, log=seen.append, **run
    )
    _, plain = train(exact, tokenizer, ROWS, batch_size=6, **run)
    assert history.losses == pytest.approx(plain.losses, rel=1e-12)
    assert math.isnan(plain.noise_scale()) and plain.gradient_signals == ()
    assert len(history.gradient_signals) == len(history.gradient_noises) == 2
    expected = sum(history.gradient_noises) / sum(history.gradient_signals)
    assert history.noise_scale() == (expected if expected > 0 else math.inf)
    assert seen[0]["gradient_noise"] == history.gradient_noises[0]
    with pytest.raises(ValueError, match="last"):
        history.noise_scale(0)
    # The whole gradient's norm is |G|^2 + S / T, by the estimates of the same step.
    tokens = history.tokens[0]
    both = history.gradient_signals[0] + history.gradient_noises[0] / tokens
    assert both == pytest.approx(history.grad_norms[0] ** 2, rel=1e-9)
