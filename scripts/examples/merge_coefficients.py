"""Learned merge coefficients: one for each layer and adapter, by a gradient through the merge.

    python scripts/examples/merge_coefficients.py [--quick] [--out FILE]     about 60 s on one core

Three adapters are trained for three tasks in one stack, and merged into one that does all three.
Its coefficients are learned from the loss of 48 rows. AdaMerging (Yang et al. 2024,
arXiv:2310.02575) learns them from the entropy; task arithmetic has one coefficient for everything.
"""

from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor

import fastlora
from fastlora import functional as FL

RANK, RATE, STEPS, SEED = 8, 3e-3, 120, 0


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the held-out loss of each way to merge."""
    steps, learning, n, tuned = (6, 4, 8, 4) if quick else (STEPS, 40, 32, 16)
    model, tokenizer = fig.demo()
    train = {name: fig.encode(rows, tokenizer) for name, rows in fig.tasks("train", quick).items()}
    held = {
        name: fig.encode(rows, tokenizer)[:n] for name, rows in fig.tasks("heldout", quick).items()
    }
    starts = [fastlora.lora(model, r=RANK, lora_alpha=32, random_state=i) for i in range(3)]
    runs: dict[str, Any] = dict(rates=[RATE] * 3, seeds=[SEED] * 3, steps=steps)
    experts, _ = fig.train_together(starts, list(train.values()), **runs)
    adapters, layers = [m.adapter for m in experts], len(model.base["layers"])
    wide = fastlora.lora(model, r=3 * RANK, lora_alpha=96)  # for the sum of three updates

    def losses(weights: Tensor, data: dict[str, Any]) -> Tensor:
        """The loss [3] of each task, with weights [layers, 3]."""
        adapter = fig.merged(adapters, weights)
        total = [FL.loss(adapter, wide.base, wide.spec, fig.as_batch(x)) for x in data.values()]
        return torch.stack(total)

    tuning = {name: examples[-tuned:] for name, examples in train.items()}
    weights = torch.full((layers, 3), 1 / 3)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(learning):
        _, weights.grad = fastlora.value_and_grad(lambda w: losses(w, tuning).mean())(weights)
        optimizer.step()

    same = lambda w: torch.tensor(w).expand(layers, -1)
    with torch.no_grad():
        scales = [0.2 + 0.1 * i for i in range(2 if quick else 11)]
        best = min(scales, key=lambda s: losses(same([s] * 3), tuning).mean().item())
        ways = {
            f"adapter\n{name}": losses(same([float(i == j) for j in range(3)]), held)
            for i, name in enumerate(train)
        }
        ways["average"] = losses(same([1 / 3] * 3), held)
        ways[f"one\ncoefficient\n{best:.1f}"] = losses(same([best] * 3), held)
        ways["learned"] = losses(weights, held)
    means = {name.replace("\n", " "): way.mean().item() for name, way in ways.items()}
    draw(weights, ways, list(train), out)
    return {"means": means, "learned": means["learned"], "one": min(list(means.values())[:-1])}


def draw(weights: Tensor, ways: dict[str, Tensor], names: list[str], out: Path) -> None:
    """Left the losses of all ways to merge, right the learned coefficients."""
    figure, (left, right) = fig.new_figure(2, 9.2, 3.9)
    for j, (name, color) in enumerate(zip(names, (fig.BLUE, fig.ORANGE, fig.GREEN), strict=True)):
        heights = [float(way[j]) for way in ways.values()]
        left.bar(
            [i + 0.27 * (j - 1) for i in range(len(ways))], heights, 0.25, color=color, label=name
        )
    left.set_xticks(range(len(ways)), list(ways), fontsize=8)
    left.set(ylabel="held-out loss of each task")
    left.legend(frameon=False, fontsize=8, title="task")
    image = right.imshow(weights, cmap="viridis", aspect="auto")
    right.set_xticks(range(3), names)
    right.set(xlabel="adapter", ylabel="layer", title="learned coefficients")
    figure.colorbar(image, ax=right)
    fig.save(figure, out)


if __name__ == "__main__":
    fig.run(main)
