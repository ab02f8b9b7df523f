"""Evolution strategies over a stack: the population is a stack of adapters, in one forward pass.

    python scripts/examples/evolution.py [--quick] [--out FILE]      about 80 s on two cores

The reward is the share of reply tokens that the model's first guess predicts: a count, which has no
gradient. Salimans et al. 2017 (arXiv:1703.03864) estimate one from antithetic perturbations and
ranked rewards; low-rank perturbations: Sarkar et al. 2025 (arXiv:2511.16652). No backward pass is
run, and no activation kept.
"""

from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL

PAIRS, SIGMA, RATE, STEPS, SEED = 16, 0.02, 0.02, 100, 0


@torch.no_grad()
def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the held-out rewards."""
    pairs, steps, every, n = (4, 5, 5, 16) if quick else (PAIRS, STEPS, 5, 64)
    model, tokenizer = fig.demo()
    model = fastlora.lora(
        model,
        r=1,
        lora_alpha=8,
        random_state=SEED,
        target_modules=("v_proj", "o_proj", "down_proj"),
    )
    _, spec = FL.stack([model])
    stream = fig.endless(fig.encode(fig.pairs("train", quick), tokenizer), 4, SEED)
    held = fig.as_batch(fig.encode(fig.pairs("heldout", quick), tokenizer)[:n])
    generator = torch.Generator().manual_seed(SEED)

    def rewards(stack: Any, batch: fig.Batch) -> Tensor:
        """The share [n] of reply tokens that each adapter's first guess predicts."""
        members = len(tree_leaves(stack)[0])
        batch = fig.for_all(batch, members)
        logits = FL.forward(stack, model.base, spec, batch["input_ids"])
        labels = batch["labels"][:, 1:]
        right = (logits[:, :-1].argmax(-1) == labels).view(members, -1).sum(1)
        return right / (labels != -100).view(members, -1).sum(1)

    mean = tree_map(torch.clone, model.adapter)
    alone = lambda: rewards(tree_map(lambda x: x[None], mean), held).item()
    optimizer = torch.optim.Adam(tree_leaves(mean), lr=RATE)
    curve, population = [], []
    for step in range(steps + 1):
        if step % every == 0:
            curve.append(alone())
            print(step, curve[-1], flush=True)
        noise = tree_map(lambda x: torch.randn(pairs, *x.shape, generator=generator), mean)
        stack = tree_map(lambda x, e: torch.cat([x + SIGMA * e, x - SIGMA * e]), mean, noise)
        found = rewards(stack, fig.as_batch(next(stream)))
        population.append(found)
        # Ranks in [-0.5, 0.5]; equal rewards get equal ranks.
        rank = (found[:, None] > found).float().sum(1) + 0.5 * (
            found[:, None] == found
        ).float().sum(1)
        rank = rank / len(found) - 0.5
        weight = (rank[:pairs] - rank[pairs:]) / (2 * pairs * SIGMA)
        for x, e in zip(tree_leaves(mean), tree_leaves(noise), strict=True):
            x.grad = -torch.tensordot(weight, e, 1)
        optimizer.step()
    figure, (axis,) = fig.new_figure()
    axis.plot(range(0, steps + 1, every), curve, "o-", color=fig.BLUE, label="held-out rows")
    fig.save(figure, out)
    return {"rewards": curve, "pop": population}


if __name__ == "__main__":
    fig.run(main)
