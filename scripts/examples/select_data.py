"""Data selection by influence: LESS finds the rows of a pool that help a task.

    python scripts/examples/select_data.py [--quick] [--out FILE]      about 90 s on two cores

A quarter of the pool has the task of the held-out rows, to summarise a function. In the other rows
the reply is wrong: the signature of another function. A short run over a quarter of the pool leaves
checkpoints with Adam's moments. `research.influence` compares Adam's step for each row with the
gradients of ten held-out rows (LESS, Xia et al. 2024, arXiv:2402.04333). New adapters are then
trained on the rows with the most influence, on random ones, and on those with the least.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import figures as fig
import torch
from torch import Tensor

import fastlora
from fastlora import functional as FL
from fastlora import research
from fastlora.data.examples import Example

ROWS, TARGETS, STEPS, EVERY, SEEDS, RATE = 32, 10, 24, 4, (0, 1, 2), 1e-3
GROUPS = {"most influence": fig.BLUE, "random": fig.GREY, "least influence": fig.ORANGE}


def influence_of(
    model: fastlora.Model, tokenizer: Any, pool: list, targets: list[Example], steps: int
) -> Tensor:
    """The mean influence of each (prompt, reply) on the targets, in units of the largest."""
    warm_up = [{"prompt": p, "completion": r} for p, r in pool[::4]]
    with TemporaryDirectory() as folder:
        how: dict[str, Any] = dict(max_steps=steps, learning_rate=RATE, packing=False)
        how |= dict(save_every=steps // 3, keep=None, progress=False)
        fastlora.train(model, tokenizer, warm_up, output_dir=folder, **how)
        points = research.training_points(model, folder)

    def losses(adapter: Any, batch: fig.Batch) -> Tensor:
        total, tokens = FL.row_losses(adapter, model.base, model.spec, batch)
        return total / tokens.clamp(min=1)

    examples = fig.encode(pool, tokenizer, longest=512)
    batches = [fig.as_batch(examples[i : i + 16]) for i in range(0, len(examples), 16)]
    scores = research.influence(losses, points, batches, [fig.as_batch(targets)])
    return scores.mean(1) / scores.mean(1).max()


def train_on(
    model: fastlora.Model, groups: list[list[Example]], test: list[Example], steps: int, every: int
) -> Tensor:
    """Held-out losses [1 + steps / every, groups, seeds] of runs that share each pass."""
    runs = [fig.begin(model, RATE) for _ in groups for _ in SEEDS]
    streams = [fig.endless(rows, 4, seed) for rows in groups for seed in SEEDS]
    evaluate = lambda: fig.evaluate([run.model for run in runs], test)
    losses = [evaluate()]
    for step in range(1, steps + 1):
        rows = [example for stream in streams for example in next(stream)]
        fig.step_together(runs, fig.as_batch(rows))
        if step % every == 0:
            losses.append(evaluate())
    return torch.stack(losses).view(-1, len(groups), len(SEEDS))


def draw(losses: Tensor, score: Tensor, ours: Tensor, every: int, out: Path) -> None:
    """The scores of both tasks, and the held-out loss of each group."""
    figure, (left, right) = fig.new_figure(2, width=8.6, height=3.6)
    bins = torch.linspace(float(score.min()), float(score.max()), 25).tolist()
    for rows, name, color in (
        (ours, "right replies", fig.BLUE),
        (~ours, "wrong replies", fig.ORANGE),
    ):
        left.hist(score[rows].tolist(), bins=bins, color=color, alpha=0.7, label=name)
    left.set(xlabel="influence on the held-out rows", ylabel="rows of the pool")
    left.legend(frameon=False)
    steps = [every * i for i in range(len(losses))]
    for i, (name, color) in enumerate(GROUPS.items()):
        own = losses[:, i]
        right.plot(steps, own.mean(1), color=color, label=name)
        right.fill_between(steps, own.amin(1), own.amax(1), color=color, alpha=0.2, linewidth=0)
    right.set(xlabel="step", ylabel="held-out loss (three orders)")
    right.legend(frameon=False)
    fig.save(figure, out)


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the AUC of the scores and the last losses of each group."""
    n, steps, every = (6, 4, 2) if quick else (ROWS, STEPS, EVERY)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=4, random_state=0)
    tasks = fig.tasks("train", quick)
    short = lambda rows: [row for row in rows if sum(map(len, row)) <= 120]  # characters
    # Different functions in each part, so that no prompt is in the pool twice.
    right, codes = short(tasks["summary"]), tasks["signature"][::-1]
    wrong = short([(p, code) for (p, _), (_, code) in zip(right[n:], codes, strict=False)])
    pool = right[:n] + wrong[: 3 * n]
    held = fig.encode(fig.pairs("heldout", quick), tokenizer, longest=48)
    targets, test = held[:TARGETS], held[TARGETS : TARGETS + (8 if quick else 32)]
    score = influence_of(model, tokenizer, pool, targets, 3 if quick else 24)
    ours = torch.arange(len(pool)) < n
    auc = (score[ours][:, None] > score[~ours]).float().mean().item()
    order = score.argsort(descending=True)
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(5))
    chosen = (order[:n], drawn[:n], order[-n:])
    groups = [fig.encode([pool[i] for i in rows], tokenizer, longest=512) for rows in chosen]
    losses = train_on(model, groups, test, steps, every)
    draw(losses, score, ours, every, out)
    last = dict(zip(GROUPS, losses[-1].tolist(), strict=True))
    return {"auc": auc, "before": losses[0, 0, 0].item(), "losses": last}


if __name__ == "__main__":
    fig.run(main)
