"""Loss against rank: how much an adapter of each rank can memorise. All ranks train in one stack.

    python scripts/examples/rank_curve.py [--quick] [--out FILE]      about 105 s on one core

Schulman et al. 2025, "LoRA Without Regret" (thinkingmachines.ai/blog/lora): with alpha = 32 and one
learning rate for all ranks, the training losses of all ranks fall together. A rank that has no more
capacity for the data leaves the common curve. Here 128 rows are read again and again.
"""

from pathlib import Path
from typing import Any

import figures as fig
from matplotlib import colormaps

import fastlora

RANKS = (1, 2, 4, 8, 16, 32, 64)
ROWS, RATE, SEED = 128, 3e-3, 0


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the final training loss of each rank."""
    ranks, n, steps = ((1, 16), 32, 16) if quick else (RANKS, ROWS, 144)
    model, tokenizer = fig.demo()
    examples = fig.encode(fig.pairs("train", quick)[:1000], tokenizer)[:n]
    models = [fastlora.lora(model, r=r, lora_alpha=32, random_state=SEED) for r in ranks]
    data, rates, seeds = [examples] * len(ranks), [RATE] * len(ranks), [SEED] * len(ranks)
    _, losses = fig.train_together(models, data, rates=rates, seeds=seeds, steps=steps)
    curves = fig.smooth(losses, n // 8)  # means over one epoch
    final = curves[-1].tolist()

    figure, (left, right) = fig.new_figure(2, 8.4, 3.8)
    colors = [colormaps["viridis"](0.9 * i / (len(ranks) - 1)) for i in range(len(ranks))]
    for rank, color, curve in zip(ranks, colors, curves.T, strict=True):
        left.plot(range(1, steps + 1), curve, color=color, label=f"{rank}")
    left.set(xlabel="step", ylabel="training loss, mean of an epoch", yscale="log")
    left.set_yticks([5, 2, 1, 0.5, 0.2], ["5", "2", "1", "0.5", "0.2"])
    left.legend(title="rank", frameon=False, fontsize=8, loc="lower left")
    right.plot(ranks, final, color=fig.GREY, zorder=1)
    right.scatter(ranks, final, color=colors, zorder=2)
    right.set(xlabel="rank", xscale="log", yscale="log", xticks=ranks, xticklabels=ranks)
    right.set(title=f"after {steps} steps", ylabel="training loss")
    right.set_yticks([1, 0.5, 0.2], ["1", "0.5", "0.2"])
    for axis in (left, right):
        axis.minorticks_off()
    fig.save(figure, out)
    return {"ranks": list(ranks), "final_losses": final}


if __name__ == "__main__":
    fig.run(main)
