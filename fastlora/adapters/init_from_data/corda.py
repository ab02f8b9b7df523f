"""CorDA: A and B from the singular directions of W C, with C the covariance of the inputs
(Yang et al. 2024, arXiv:2406.05223; peft 0.21.2, tuners/lora/corda.py)."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init.decompositions import factors_from_svd
from fastlora.adapters.init_from_data.layer_inputs import (
    Inputs,
    embed_batches,
    inputs_by_layer,
    targets_by_input,
)
from fastlora.adapters.init_from_data.settings import InitSettings, with_initial_factors
from fastlora.errors import raise_problems
from fastlora.models.params import LoRA
from fastlora.models.spec import Target
from fastlora.models.state import Batch, StateT, require_adapter
from fastlora.ops.quant.dequantize import dense


def corda(model: StateT, batches: Sequence[Batch], settings: InitSettings) -> StateT:
    """The model with A and B set by CorDA; the base has the initial offset."""
    lora, _ = require_adapter(model)
    dtype, factors = model.base["norm"].dtype, []
    for i, inputs in inputs_by_layer(model, embed_batches(model, batches, use_label_mask=False)):
        groups, params = targets_by_input(lora.targets[i]), model.base["layers"][i]
        # All covariances of one layer are on the device at once: for 8B, 822 MB in float32 for
        # down_proj (14,336 x 14,336) and 67 MB for each of the other inputs, and as much again for
        # their inverses.
        layer: dict[str, LoRA] = {}
        for source, (covariance, inverse) in _covariances(inputs, groups).items():
            for t in groups[source]:
                weight = dense(params[t.name]["weight"], dtype)
                layer[t.name] = _corda_factors(weight, covariance, inverse, t, settings)
        factors.append(layer)
    return with_initial_factors(model, factors, "corda")


def _covariances(inputs: Inputs, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (damped covariance, its inverse): the mean of X'X over batches.

    Each X is divided by its maximum, and not by its largest magnitude, as in PEFT and in CorDA's
    published code.
    """
    sums: dict[str, Tensor] = {}
    n = 0
    for batch in inputs:
        n += 1
        for name in names:
            # Without a positive value this gives NaN or infinity, which is reported below.
            x = batch[name] / batch[name].max().abs()
            sums[name] = sums[name] + x.mT @ x if name in sums else x.mT @ x
    broken = [name for name, total in sums.items() if not total.isfinite().all()]
    cure = "These inputs are not finite, or have no positive value: look for NaN in the base."
    heading = "fastlora.initialize cannot compute the covariance of the inputs of:"
    raise_problems(ValueError, heading, broken, cure)
    return {name: _damped(total / n) for name, total in sums.items()}


def _damped(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """(C + damp * mean(diag C) * I, its inverse).

    damp starts at 0.01 and doubles until |C C^-1 - I| < 0.05 in the Frobenius norm.
    """
    unit = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    level, damp = covariance.diagonal().mean(), 0.01
    while True:
        damped = covariance + damp * level * unit
        inverse = torch.linalg.inv(damped)
        if float((damped @ inverse - unit).norm()) < 0.05:
            return damped, inverse
        damp *= 2


def _corda_factors(
    weight: Float[Tensor, "d_out d_in"],
    covariance: Float[Tensor, "d_in d_in"],
    inverse: Float[Tensor, "d_in d_in"],
    t: Target,
    settings: InitSettings,
) -> LoRA:
    """A0 and B0 with scaling * B0 A0 = U S V' C^-1, of r directions of W C = U S V'."""
    u, s, vh = torch.linalg.svd(weight.to(covariance.dtype) @ covariance, full_matrices=False)
    # Singular values come in descending order.
    largest, smallest = slice(None, t.r), slice(-t.r, None)
    kept = largest if settings.corda_method == "ipm" else smallest
    return factors_from_svd(u[:, kept], s[kept], vh[kept] @ inverse, t.scaling)
