"""lora_ga."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.adapters.init.from_weights import randomised_svd
from fastlora.adapters.init_from_data.layer_inputs import (
    batch_positions,
    exhaust,
    layer_rows,
    start_passes,
)
from fastlora.adapters.init_from_data.settings import InitSettings, has_started, lora_config
from fastlora.functional import trained_labels
from fastlora.models.attention import attention_block
from fastlora.models.decoder import Positions
from fastlora.models.head import head
from fastlora.models.mlp import mlp_block
from fastlora.models.params import Base, LoRA
from fastlora.models.projections import layer_spec
from fastlora.models.spec import Spec, Target
from fastlora.models.state import Batch, ModelState, StateT
from fastlora.ops.loss.linear_cross_entropy import IGNORE, linear_logprobs
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.rms_norm import rms_norm
from fastlora.runtime.gradients import value_and_grad


# ── lora_ga ───────────────────────────────────────────────────────────────────────────────
def lora_ga(model: StateT, batches: Sequence[Batch], choices: InitSettings) -> StateT:
    lora, generator = lora_config(model), torch.Generator().manual_seed(choices.random_state)
    pair = partial(_lora_ga_pair, choices=choices, generator=generator)
    found: list[dict[str, LoRA]] = []
    for i, gradients in _gradients(model, batches):
        params = model.base["layers"][i]
        found.append({t.name: pair(gradients[t.name], params[t.name], t) for t in lora.targets[i]})
    return has_started(model, found[::-1], "lora_ga")


def _gradients(
    model: ModelState, batches: Sequence[Batch]
) -> Iterator[tuple[int, dict[str, Float[Tensor, "d_out d_in"]]]]:
    """(layer, gradient of the loss by the weight of each target), the last layer first."""
    base, spec = model.base, model.spec
    passes = start_passes(model, batches, use_label_mask=False)
    entered = [[x for x, _, _ in passes]]  # by layer, by batch
    for _, rows in layer_rows(model, passes):
        exhaust(rows)
        entered.append([x for x, _, _ in passes])
    device = base["norm"].device
    arrived = zip(entered.pop(), batches, strict=True)
    flowing = [_head_gradient(x.to(device), base, spec, batch).cpu() for x, batch in arrived]
    for i in reversed(range(len(entered))):
        names = [t.name for t in lora_config(model).targets[i]]
        total: dict[str, Tensor] = {}
        for n, x in enumerate(entered.pop()):
            weights = {name: dense(base["layers"][i][name]["weight"], x.dtype) for name in names}
            at = batch_positions(spec, batches[n], x.dtype)
            run = partial(_layer_product, base=base, spec=spec, i=i, at=at)
            leaves = {"x": x.to(device), "weights": weights}
            _, grads = value_and_grad(run)(leaves, dy=flowing[n].to(device))
            flowing[n] = grads["x"].cpu()
            for name, g in grads["weights"].items():
                wide = g.to(torch.promote_types(g.dtype, torch.float32)) / len(batches)
                total[name] = total[name] + wide if name in total else wide
        yield i, total


def _head_gradient(x: Tensor, base: Base, spec: Spec, batch: Batch) -> Float[Tensor, "b t d"]:
    """Of the mean loss, by what enters the final norm."""
    following = F.pad(trained_labels(batch)[:, 1:], (0, 1), value=IGNORE)

    def loss(x: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
        normed = rms_norm(x, base["norm"], spec.config.rms_norm_eps)
        logp = linear_logprobs(
            normed.flatten(0, 1), head(None, base, spec)["weight"], following.flatten()
        )
        return -logp.sum() / (following != IGNORE).sum().clamp(min=1)

    return value_and_grad(loss)(x)[1]


def _layer_product(
    leaves: dict[str, Any], *, dy: Tensor, base: Base, spec: Spec, i: int, at: Positions
) -> Float[Tensor, ""]:
    """<layer(x), dy>, whose gradients are those of the loss."""
    params = dict(base["layers"][i])
    params |= {n: {**params[n], "weight": w} for n, w in leaves["weights"].items()}
    static, mask = layer_spec(spec, i), at.masks[spec.config.layer_types[i]]
    x = leaves["x"]
    x = x + attention_block(x, params, {}, at.cos, at.sin, mask, static, None)
    y = mlp_block(x, params, {}, static, None)
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * dy.to(wide)).sum()


def _lora_ga_pair(
    gradient: Float[Tensor, "d_out d_in"],
    linear: Mapping[str, Any],
    t: Target,
    choices: InitSettings,
    generator: torch.Generator,
) -> LoRA:
    rank = min(4 * t.r, *gradient.shape)
    u, s, vh = randomised_svd(gradient, rank, 4, generator)
    for_a, for_b = _split(t.r, choices.direction, generator)
    a, b, largest = vh[for_a], u[:, for_b] * s[for_b], s[for_b][0]
    if choices.scale == "stable":
        b = b * (b.shape[0] ** 0.25 / choices.stable_gamma**0.5)
    elif choices.scale == "weight_svd" and largest > 0:
        weight = dense(linear["weight"], gradient.dtype).to(gradient.dtype)
        b = b * (torch.linalg.matrix_norm(weight, 2) / largest)
    elif choices.scale == "gd_scale":
        a, b = a / t.scaling, b / t.scaling
    return LoRA(a, b)


def _split(
    r: int, direction: str, generator: torch.Generator
) -> tuple[Int[Tensor, "r"], Int[Tensor, "r"]]:
    """Which of the first 2r directions A gets, and which B."""
    order = torch.arange(2 * r)
    if direction == "ArB2r":
        return order[:r], order[r:]
    if direction == "A2rBr":
        return order[r:], order[:r]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    drawn = torch.randperm(2 * r, generator=generator)[:r]
    return drawn, drawn
