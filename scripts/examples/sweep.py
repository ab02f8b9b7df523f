"""Rank x learning rate in one run, with successive halving: a sweep is a list of models.

    python scripts/examples/sweep.py [--quick] [--out FILE]      about 100 s on one core

`fastlora.train` takes a list: each run has its rank and learning rate, and all share each pass over
the base. Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) is an `early_stopping`
function: after each evaluation the worse half of the runs ends. The same sweep is trained without
it as well, for the heat map: halving is right if the run that it keeps is among the best.
"""

from itertools import product
from pathlib import Path
from typing import Any

import figures as fig
from matplotlib.patches import Rectangle
from torch import Tensor, tensor

import fastlora

RANKS, RATES = (1, 4, 16), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEPS, EVERY, SEED = 64, 16, 0


def worse_half(losses: dict[int, list[float]]) -> list[int]:
    """The runs that end, given each run's held-out losses so far."""
    return sorted(losses, key=lambda run: losses[run][-1])[(len(losses) + 1) // 2 :]


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
    ranks, rates, steps, every, n = RANKS, RATES, STEPS, EVERY, 32
    if quick:
        ranks, rates, steps, every, n = RANKS[::2], RATES[2:5], 8, 4, 12
    base, tokenizer = fig.demo()
    rows, held = (
        [fig.chat(p, r) for p, r in fig.pairs(name, quick) if len(p) + len(r) < 90]
        for name in ("train", "heldout")
    )
    grid = list(product(ranks, rates))
    how: dict[str, Any] = dict(
        learning_rate=[rate for _, rate in grid], lr_scheduler="constant", warmup_ratio=0.0,
        max_steps=steps, eval_data=held[:n], eval_every=every, batch_size=4, packing=False,
        seed=SEED, progress=False,
    )  # fmt: skip

    def sweep(**more: Any) -> list[fastlora.History]:
        runs = [fastlora.lora(base, r=r, lora_alpha=32, random_state=SEED) for r, _ in grid]
        return fastlora.train(runs, tokenizer, rows, **how, **more)[1]

    halved, whole = sweep(early_stopping=worse_half), sweep()
    stopped = [history.steps[-1] for history in halved]
    kept = min((h.eval_losses[-1], i) for i, h in enumerate(halved) if stopped[i] == steps)[1]
    losses = tensor([history.eval_losses[-1] for history in whole])
    draw(losses.view(len(ranks), len(rates)), stopped, kept, ranks, rates, out)
    return {
        "losses": losses.tolist(),
        "kept": kept,
        "place_of_kept": int((losses < losses[kept]).sum()) + 1,
        "share_of_steps": sum(stopped) / (len(grid) * steps),
    }


if __name__ == "__main__":
    fig.run(main)
