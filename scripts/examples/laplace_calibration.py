"""Laplace-LoRA: an overconfident adapter, calibrated by its posterior.

    python scripts/examples/laplace_calibration.py [--quick] [--out FILE]      about 90 s

A small set of rows is trained until the adapter knows it by heart. On held-out rows it is then too
sure of itself. `research.laplace` puts a Gaussian around the adapter (Yang et al. 2024,
arXiv:2308.13111) and averages linearised predictions over it. The prior is the one with the least
held-out loss on rows that are not in the picture.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor

import fastlora
from fastlora import functional as FL
from fastlora import research

ROWS, STEPS, RATE, SAMPLES, BINS = 48, 100, 5e-3, 16, 8
PRIORS = (5e2, 1e3, 2e3, 4e3, 8e3, 2e4, 5e4, 1e5)


def logits_and_labels(model: fastlora.Model, batch: fig.Batch) -> tuple[Any, Tensor]:
    """(adapter -> logits [n, v] of all reply tokens, their ids [n])."""
    trained = batch["labels"][:, 1:] != -100

    def logits(adapter: Any) -> Tensor:
        return FL.forward(adapter, model.base, model.spec, batch["input_ids"])[:, :-1][trained]

    return logits, batch["labels"][:, 1:][trained]


def nll(p: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label)."""
    return -p[torch.arange(len(labels)), labels].log().mean().item()


def reliability(p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """(mean confidence, accuracy) of each bin, NaN if empty, and the expected calibration error."""
    sure, best = p.max(-1)
    number = (sure * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(number, minlength=BINS)
    mean = lambda x: torch.bincount(number, x.double(), BINS) / count
    confidence, accuracy = mean(sure), mean((best == labels).double())
    gap = ((confidence - accuracy).abs() * count).nansum() / count.sum()
    return confidence, accuracy, gap.item()


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns losses and calibration errors of adapter and posterior."""
    rows, steps, samples = (8, 4, 2) if quick else (ROWS, STEPS, SAMPLES)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=4, random_state=0)
    examples = fig.encode(fig.pairs("train", quick), tokenizer)[:rows]
    run = fig.begin(model, RATE)
    for chosen in islice(fig.endless(examples, 8, 0), steps):
        fig.step_together([run], fig.as_batch(chosen))
    adapter = run.model.adapter

    def losses(a: Any, batch: fig.Batch) -> Tensor:
        return FL.row_losses(a, model.base, model.spec, batch)[0]

    batches = [fig.as_batch(examples[i : i + 8]) for i in range(0, rows, 8)]
    posterior = research.laplace(losses, adapter, batches)
    held = fig.encode(fig.pairs("heldout", quick), tokenizer)
    size = 4 if quick else 32
    chosen_on, shown = (fig.as_batch(rows) for rows in (held[:size], held[size : 3 * size]))
    logits, labels = logits_and_labels(model, chosen_on)
    tried = {
        prior: nll(posterior.with_prior(prior).predict(logits, samples=samples), labels)
        for prior in PRIORS[:: 4 if quick else 1]
    }
    best = posterior.with_prior(min(tried, key=lambda prior: tried[prior]))
    with torch.no_grad():
        without = nll(logits(adapter).softmax(-1), labels)
    logits, labels = logits_and_labels(model, shown)
    with torch.no_grad():
        plain = logits(adapter).softmax(-1)
    found: dict[str, Any] = {"evidence": posterior.prior_precision, "prior": best.prior_precision}
    figure, (left, right) = fig.new_figure(2, width=8.2, height=3.8)
    left.plot([0, 1], [0, 1], "--", color=fig.GREY)
    for name, color, p in (
        ("adapter", fig.ORANGE, plain),
        ("posterior", fig.BLUE, best.predict(logits, samples=2 * samples)),
    ):
        confidence, accuracy, gap = reliability(p, labels)
        right_ones = (p.argmax(-1) == labels).double().mean().item()
        found[name] = {"nll": nll(p, labels), "ece": gap, "accuracy": right_ones}
        label = f"{name}: error {gap:.3f}, loss {found[name]['nll']:.2f}"
        left.plot(confidence, accuracy, "o-", color=color, label=label)
    left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    left.legend(frameon=False)
    right.plot(list(tried), list(tried.values()), "o-", color=fig.BLUE, label="posterior")
    right.axhline(without, color=fig.ORANGE, label="adapter")
    right.set(xlabel="precision of the prior", ylabel="loss of the rows to choose it on")
    right.set_xscale("log")
    right.legend(frameon=False)
    fig.save(figure, out)
    return found


if __name__ == "__main__":
    fig.run(main)
