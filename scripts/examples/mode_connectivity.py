"""Linear mode connectivity and task arithmetic: losses along lines between adapters, as stacks.

    python scripts/examples/mode_connectivity.py [--quick] [--out FILE]      about 45 s on one core

Left: the path between two runs with different seeds (of the first adapter and the order of rows),
as in Frankle et al. 2020 (arXiv:1912.05671). The loss has no barrier, and the middle is better than
both ends (Wortsman et al. 2022, arXiv:2203.05482). Right: the updates of adapters for two tasks,
added with a coefficient, give one adapter that does both (Ilharco et al. 2023, arXiv:2212.04089).
"""

from pathlib import Path
from typing import Any

import figures as fig
import torch
from torch.utils._pytree import tree_map

import fastlora

RANK, RATE, STEPS = 8, 3e-3, 120


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the losses along the path, and along the line of coefficients."""
    steps, points, n = (8, 5, 12) if quick else (STEPS, 13, 48)
    model, tokenizer = fig.demo()
    rows, others = fig.tasks("train", quick), fig.tasks("heldout", quick)
    train = {name: fig.encode(rows[name], tokenizer) for name in ("summary", "signature")}
    held = {name: fig.encode(others[name], tokenizer)[:n] for name in train}
    starts = [fastlora.lora(model, r=RANK, lora_alpha=32, random_state=seed) for seed in (0, 1, 2)]
    data = [train["summary"], train["summary"], train["signature"]]
    runs: dict[str, Any] = dict(rates=[RATE] * 3, seeds=(0, 1, 2), steps=steps)
    (one, two, other), _ = fig.train_together(starts, data, **runs)
    wide = fastlora.lora(model, r=2 * RANK, lora_alpha=64)  # for the sum of two updates

    def sums(
        pair: list[fastlora.Model], weights: list[tuple[float, float]]
    ) -> list[fastlora.Model]:
        adapters, layers = [m.adapter for m in pair], len(model.base["layers"])
        each = [fig.merged(adapters, torch.tensor(w).expand(layers, 2)) for w in weights]
        return [wide.with_adapter(adapter) for adapter in each]

    line = torch.linspace(0, 1, points).tolist()
    mixed = lambda t: tree_map(lambda x, y: torch.lerp(x, y, t), one.adapter, two.adapter)
    path = sums([one, two], [(1 - t, t) for t in line])
    path += [one.with_adapter(mixed(t)) for t in line]
    updates, factors = fig.evaluate(path, held["summary"]).view(2, -1).tolist()
    scales = torch.linspace(0, 1.2, points).tolist()
    together = sums([one, other], [(scale, scale) for scale in scales])
    both = {name: fig.evaluate(together, held[name]).tolist() for name in held}
    alone = {name: fig.evaluate([one, other], held[name]).min().item() for name in held}

    figure, (left, right) = fig.new_figure(2, 8.8, 3.8)
    left.plot(line, updates, "o-", color=fig.BLUE, label="updates BA interpolated")
    left.plot(line, factors, "s--", color=fig.ORANGE, label="factors A and B interpolated")
    left.set(xlabel="position between the two runs", ylabel="held-out loss", title="two seeds")
    left.set_ylim(top=max(factors) + 0.3 * (max(factors) - min(factors)))
    for (name, losses), color in zip(both.items(), (fig.BLUE, fig.GREEN), strict=True):
        right.plot(scales, losses, "o-", color=color, label=name)
        right.axhline(alone[name], color=color, ls=":", label=f"{name}, with its adapter alone")
    right.set(xlabel="coefficient of both updates", ylabel="held-out loss", title="two tasks")
    right.set_ylim(top=7.5)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8, loc="upper center")
    fig.save(figure, out)
    return {"updates": updates, "factors": factors, "both": both, "alone": alone}


if __name__ == "__main__":
    fig.run(main)
