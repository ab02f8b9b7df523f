"""The Hessian's spectrum before and after fine-tuning, by Lanczos over Hessian-vector products.

    python scripts/examples/hessian_spectrum.py [--quick] [--out FILE]      about 60 s on two cores

`research.hvp` linearises the gradient once; `research.as_linear_operator` gives SciPy's `eigsh` its
products. The Gauss-Newton matrix, which has no negative eigenvalue, is drawn beside the Hessian.
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import figures as fig
import numpy as np
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora import research

STEPS, VALUES, ROWS, RATE = 60, 24, 4, 3e-3


def extremes(product: Callable[[Any], Any], adapter: Any, k: int) -> list[float]:
    """The k eigenvalues of largest magnitude, ascending."""
    operator = research.as_linear_operator(product, adapter)
    first = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
    how: dict[str, Any] = dict(ncv=3 * k, v0=first, tol=1e-2, return_eigenvectors=False)
    values: Any = eigsh(operator, k=k, **how)
    return sorted(values.tolist())


def spectrum(model: fastlora.Model, adapter: Any, batch: fig.Batch, k: int) -> dict[str, Any]:
    """Extreme eigenvalues of the Hessian and of the Gauss-Newton matrix of the batch's loss."""
    trained = batch["labels"][:, 1:] != -100

    def loss(a: Any) -> Tensor:
        return FL.loss(a, model.base, model.spec, batch)

    def logits(a: Any) -> Tensor:
        return FL.forward(a, model.base, model.spec, batch["input_ids"])[:, :-1][trained]

    return {
        "loss": loss(adapter).item(),
        "hessian": extremes(research.hvp(loss, adapter), adapter, k),
        "gauss_newton": extremes(research.ggnvp(logits, adapter), adapter, k),
    }


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the eigenvalues before and after training."""
    steps, k = (4, 3) if quick else (STEPS, VALUES)
    model, tokenizer = fig.demo()
    model = fastlora.lora(model, r=4, random_state=0)
    examples = fig.encode(fig.pairs("train", quick), tokenizer)
    batch = fig.as_batch(examples[: 2 if quick else ROWS])
    run = fig.begin(model, RATE)
    # B begins at 0, where most of the Hessian is zero; after one step it is not.
    points = {}
    for step, rows in enumerate(islice(fig.endless(examples, 8, 0), steps), 1):
        fig.step_together([run], fig.as_batch(rows))
        if step in (1, steps):
            points[step] = tree_map(lambda x: x.detach().clone(), run.model.adapter)
    found = {step: spectrum(model, adapter, batch, k) for step, adapter in points.items()}
    figure, axes = fig.new_figure(2, width=8.6, height=2.6)
    for axis, (step, own) in zip(axes, found.items(), strict=True):
        named = (("Hessian", fig.BLUE, "hessian"), ("Gauss-Newton", fig.ORANGE, "gauss_newton"))
        for row, (name, color, key) in enumerate(named):
            axis.plot(own[key], [row] * k, "|", color=color, markersize=24, label=name)
        axis.axvline(0, color=fig.GREY, linewidth=0.8)
        axis.set(title=f"after {step} steps, loss {own['loss']:.2f}", xlabel="eigenvalue")
        axis.set(ylim=(-0.7, 1.7), yticks=(0, 1), yticklabels=("Hessian", "Gauss-Newton"))
    fig.save(figure, out)
    return {"before": found[1], "after": found[steps]}


if __name__ == "__main__":
    fig.run(main)
