"""Linearised fine-tuning beside the real one: when a run leaves its tangent model.

    python scripts/examples/linearised.py [--quick] [--out FILE]      about 35 s on one core

The tangent model's logits are f(a0) + J d, for a displacement d of the adapter a0: one jvp of
`FL.forward`. Training d is what the neural tangent kernel describes (Jacot et al. 2018,
arXiv:1806.07572; for language models Malladi et al. 2023, arXiv:2210.05643). B begins at 0, so that
the derivative by A is 0 there, and the tangent model trains B alone.
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import figures as fig
import torch
import torch.nn.functional as F
from torch.func import jvp
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL

RATE, STEPS, EVERY, SEED = 1e-3, 60, 4, 0
Loss = Callable[[Any, fig.Batch], torch.Tensor]


def losses_of(model: fastlora.Model) -> tuple[Loss, Loss]:
    """The loss at adapter + displacement: of the model, and of its tangent model."""
    start, base, spec = model.adapter, model.base, model.spec

    def real(displacement: Any, batch: fig.Batch) -> torch.Tensor:
        return FL.loss(fig.added(start, displacement), base, spec, batch)

    def tangent(displacement: Any, batch: fig.Batch) -> torch.Tensor:
        logits = lambda adapter: FL.forward(adapter, base, spec, batch["input_ids"])
        value, slope = jvp(logits, (start,), (displacement,))[:2]
        return F.cross_entropy(
            (value + slope)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )

    return real, tangent


def fit(loss: Loss, start: Any, batches: list[fig.Batch], rate: float, every: int) -> list[Any]:
    """The displacement after 0, `every`, 2 * `every`, ... steps of AdamW."""
    displacement = tree_map(torch.zeros_like, start)
    optimizer = torch.optim.AdamW(tree_leaves(displacement), lr=rate, weight_decay=0.0)
    kept = [tree_map(torch.clone, displacement)]
    for step, batch in enumerate(batches, 1):
        _, grads = fastlora.value_and_grad(loss)(displacement, batch)
        for x, g in zip(tree_leaves(displacement), tree_leaves(grads), strict=True):
            x.grad = g
        optimizer.step()
        if step % every == 0:
            kept.append(tree_map(torch.clone, displacement))
    return kept


@torch.no_grad()
def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the held-out losses of both runs."""
    steps, every, n = (4, 2, 16) if quick else (STEPS, EVERY, 32)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=8, random_state=SEED)
    held = fig.as_batch(fig.encode(fig.pairs("heldout", quick), tokenizer)[:n])
    stream = fig.endless(fig.encode(fig.pairs("train", quick), tokenizer), 8, SEED)
    batches = [fig.as_batch(rows) for rows in islice(stream, steps)]
    real, tangent = losses_of(model)
    ours = fit(real, model.adapter, batches, RATE, every)
    theirs = fit(tangent, model.adapter, batches, RATE, every)
    curves = {
        "real fine-tuning": [real(d, held).item() for d in ours],
        "tangent model": [tangent(d, held).item() for d in theirs],
        "the tangent model's adapter in the real model": [real(d, held).item() for d in theirs],
    }
    figure, (axis,) = fig.new_figure()
    colors, styles = (fig.BLUE, fig.ORANGE, fig.ORANGE), ("-", "-", "--")
    for (name, curve), color, style in zip(curves.items(), colors, styles, strict=True):
        axis.plot(range(0, steps + 1, every), curve, style, color=color, label=name)
    axis.set(xlabel="step", ylabel="held-out loss")
    axis.legend(frameon=False)
    fig.save(figure, out)
    return dict(zip(("real", "tangent", "tangent_in_real"), curves.values(), strict=True))


if __name__ == "__main__":
    fig.run(main)
