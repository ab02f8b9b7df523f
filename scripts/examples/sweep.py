"""Rank x learning rate in one run, with successive halving: a sweep is a stack of adapters.

    python scripts/examples/sweep.py [--quick] [--out FILE]      about 100 s on one core

Each run is one adapter of the stack, with its rank and learning rate. All runs share each pass over
the base. Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) evaluates all runs,
keeps half of them, and trains these on. The runs that it drops are trained to the end as well, for
the heat map: halving is right if it keeps a run that is among the best in the end.
"""

from itertools import islice, product
from pathlib import Path
from typing import Any

import figures as fig
from matplotlib.patches import Rectangle
from torch import Tensor

import fastlora
from fastlora.data.examples import Example

RANKS, RATES = (1, 4, 16), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RUNGS, SEED = (24, 48, 72, 96), 0


def train(runs: list[fig.Run], examples: list[Example], first: int, last: int) -> None:
    """Steps `first` to `last` - 1 of all runs in one pass each, on the same rows."""
    for rows in islice(fig.endless(examples, 4, SEED), first, last):
        fig.step_together(runs, fig.for_all(fig.as_batch(rows), len(runs)))


def evaluate(runs: list[fig.Run], held: list[Example]) -> Tensor:
    """The held-out loss [n] of each run."""
    return fig.evaluate([run.model for run in runs], held)


def halve(
    runs: list[fig.Run], examples: list[Example], held: list[Example], rungs: tuple[int, ...]
) -> tuple[int, list[int]]:
    """(the run that is left, the step after which each run stopped)."""
    left, stopped, first = list(range(len(runs))), [0] * len(runs), 0
    for last in rungs:
        alive = [runs[i] for i in left]
        train(alive, examples, first, last)
        for i in left:
            stopped[i] = last
        order = evaluate(alive, held).argsort().tolist()
        left = [left[i] for i in order[: max(1, len(left) // 2)]]
        first = last
    return left[0], stopped


def draw(losses: Tensor, stopped: list[int], kept: int, ranks: Any, rates: Any, out: Path) -> None:
    """The heat map of the losses [ranks, rates] after all steps, and where halving stopped."""
    figure, (axis,) = fig.new_figure(width=6.6, height=3.6)
    low, last = float(losses.min()), max(stopped)
    image = axis.imshow(losses, cmap="viridis_r", vmin=low, vmax=low + 1, aspect="auto")
    for i, (y, x) in enumerate(product(range(len(ranks)), range(len(rates)))):
        loss = float(losses[y, x])
        text = f"{loss:.2f}\n{'to the end' if stopped[i] == last else f'{stopped[i]} steps'}"
        color = "white" if loss > low + 0.5 else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
        if i == kept:
            box = Rectangle(
                (x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor=fig.ORANGE, lw=3
            )
            axis.add_patch(box)
    axis.set(xlabel="learning rate", ylabel="rank")
    axis.set_title("held-out loss, and the steps that halving gives each run", fontsize=10)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    figure.colorbar(image, ax=axis, label=f"held-out loss after {last} steps", extend="max")
    fig.save(figure, out)


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the losses, the run that halving keeps, and its share of steps."""
    ranks, rates, rungs = (RANKS[::2], RATES[2:5], (4, 8, 12)) if quick else (RANKS, RATES, RUNGS)
    model, tokenizer = fig.demo()
    examples = fig.encode(fig.pairs("train", quick), tokenizer)
    held = fig.encode(fig.pairs("heldout", quick), tokenizer)[:64]
    runs = [
        fig.begin(fastlora.lora(model, r=r, lora_alpha=32, random_state=SEED), rate)
        for r, rate in product(ranks, rates)
    ]
    kept, stopped = halve(runs, examples, held, rungs)
    for first in rungs[:-1]:  # for the heat map only
        train(
            [run for run, n in zip(runs, stopped, strict=True) if n == first],
            examples,
            first,
            rungs[-1],
        )
    losses = evaluate(runs, held)
    draw(losses.view(len(ranks), len(rates)), stopped, kept, ranks, rates, out)
    return {
        "losses": losses.tolist(),
        "kept": kept,
        "place_of_kept": int((losses < losses[kept]).sum()) + 1,
        "share_of_steps": sum(stopped) / (len(runs) * rungs[-1]),
    }


if __name__ == "__main__":
    fig.run(main)
