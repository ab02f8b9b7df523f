"""corda."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init.from_weights import balanced
from fastlora.adapters.init_from_data.layer_inputs import (
    Rows,
    layer_rows,
    start_passes,
    targets_by_source,
)
from fastlora.adapters.init_from_data.settings import InitSettings, has_started, lora_config
from fastlora.errors import raise_problems
from fastlora.models.params import LoRA
from fastlora.models.spec import Target
from fastlora.models.state import Batch, StateT
from fastlora.ops.quant.dequantize import dense


# ── corda ─────────────────────────────────────────────────────────────────────────────────
def corda(model: StateT, batches: Sequence[Batch], choices: InitSettings) -> StateT:
    lora, passes = lora_config(model), start_passes(model, batches, use_label_mask=False)
    found: list[dict[str, LoRA]] = []
    for i, rows in layer_rows(model, passes):
        sources = targets_by_source(lora.targets[i])
        covariances = _covariances(rows, sources)
        params, dtype = model.base["layers"][i], model.base["norm"].dtype
        found.append(
            {
                t.name: _corda_pair(
                    dense(params[t.name]["weight"], dtype), *covariances[n], t, choices
                )
                for n, ts in sources.items()
                for t in ts
            }
        )
    return has_started(model, found, "corda")


def _covariances(rows: Rows, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (damped covariance, its inverse): the mean over batches of X'X, X over its maximum.

    The maximum, not the largest magnitude: what PEFT and CorDA's own code divide by.
    """
    sums: dict[str, Tensor] = {}
    n = 0
    for batch in rows:
        n += 1
        for name in names:
            x = batch[name] / batch[name].max().abs()
            sums[name] = sums[name] + x.mT @ x if name in sums else x.mT @ x
    broken = [name for name, total in sums.items() if not total.isfinite().all()]
    cure = "Their inputs are not finite, or nowhere positive: look for NaN in the base."
    raise_problems(ValueError, "fastlora.initialize: no covariance of the inputs of", broken, cure)
    return {name: _damped(total / n) for name, total in sums.items()}


def _damped(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """(C + damp * mean(diag C) * I, its inverse), damp doubled from 0.01 until the inverse is one:
    |C C^-1 - I| < 0.05 in the Frobenius norm."""
    unit = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    level, damp = covariance.diagonal().mean(), 0.01
    while True:
        damped = covariance + damp * level * unit
        inverse = torch.linalg.inv(damped)
        if float((damped @ inverse - unit).norm()) < 0.05:
            return damped, inverse
        damp *= 2


def _corda_pair(
    weight: Tensor, covariance: Tensor, inverse: Tensor, t: Target, c: InitSettings
) -> LoRA:
    u, s, vh = torch.linalg.svd(weight.to(covariance.dtype) @ covariance, full_matrices=False)
    kept = slice(None, t.r) if c.corda_method == "ipm" else slice(s.shape[0] - t.r, None)
    return balanced(u[:, kept], s[kept], vh[kept] @ inverse, t.scaling)
