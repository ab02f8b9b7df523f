"""LoRA-GA: A and B from the singular directions of the loss's gradient with respect to W
(Wang et al. 2024, arXiv:2407.05000; peft 0.21.2, tuners/lora/layer.py:619)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.adapters.init.decompositions import randomised_svd
from fastlora.adapters.init_from_data.layer_inputs import (
    batch_positions,
    embed_batches,
    inputs_by_layer,
    run_to_end,
)
from fastlora.adapters.init_from_data.settings import InitSettings, with_initial_factors
from fastlora.functional import trained_labels
from fastlora.models.attention import add_residual, attention_block
from fastlora.models.decoder import Positions
from fastlora.models.head import divided, head
from fastlora.models.layer_spec import layer_spec
from fastlora.models.mlp import mlp_block
from fastlora.models.params import Base, LoRA
from fastlora.models.spec import Spec, Target
from fastlora.models.state import Batch, ModelState, StateT, require_adapter
from fastlora.ops.loss.ignore import IGNORE
from fastlora.ops.loss.linear_cross_entropy import linear_logprobs
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.rms_norm import rms_norm
from fastlora.runtime.gradients import value_and_grad


def lora_ga(model: StateT, batches: Sequence[Batch], settings: InitSettings) -> StateT:
    """The model with A and B set by LoRA-GA; the base has the initial offset."""
    lora, _ = require_adapter(model)
    generator = torch.Generator().manual_seed(settings.random_state)
    factors: list[dict[str, LoRA]] = []
    for i, gradients in weight_gradients(model, batches):
        params = model.base["layers"][i]
        factors.append(
            {
                t.name: _lora_ga_factors(gradients[t.name], params[t.name], t, settings, generator)
                for t in lora.targets[i]
            }
        )
    # The gradients came from the last layer back to the first.
    return with_initial_factors(model, factors[::-1], "lora_ga")


def weight_gradients(
    model: ModelState, batches: Sequence[Batch]
) -> Iterator[tuple[int, dict[str, Float[Tensor, "d_out d_in"]]]]:
    """Yield (layer, target -> gradient of the mean loss by its weight), from the last layer back.

    Gradients are means over the batches, in at least float32. The host holds each layer's inputs
    and the gradients with respect to them; the device holds one batch of one layer.
    """
    base, spec = model.base, model.spec
    lora, _ = require_adapter(model)
    states = embed_batches(model, batches, use_label_mask=False)
    entering = [[state.x for state in states]]  # by layer, by batch
    for _, inputs in inputs_by_layer(model, states):
        run_to_end(inputs)
        entering.append([state.x for state in states])
    device = base["norm"].device
    outputs = zip(entering.pop(), batches, strict=True)
    dys = [_head_gradient(x.to(device), base, spec, batch).cpu() for x, batch in outputs]
    # Back from the last layer: dys holds the loss's gradient by the output of layer i.
    for i in reversed(range(len(entering))):
        names = [t.name for t in lora.targets[i]]
        total: dict[str, Tensor] = {}
        # pop frees the inputs of a layer that is done.
        for n, x in enumerate(entering.pop()):
            weights = {name: dense(base["layers"][i][name]["weight"], x.dtype) for name in names}
            positions = batch_positions(spec, batches[n], x.dtype)
            run = partial(_output_times_dy, base=base, spec=spec, i=i, positions=positions)
            leaves = {"x": x.to(device), "weights": weights}
            _, grads = value_and_grad(run)(leaves, dy=dys[n].to(device))
            dys[n] = grads["x"].cpu()
            for name, g in grads["weights"].items():
                mean = g.to(torch.promote_types(g.dtype, torch.float32)) / len(batches)
                total[name] = total[name] + mean if name in total else mean
        yield i, total


def _head_gradient(x: Tensor, base: Base, spec: Spec, batch: Batch) -> Float[Tensor, "b t d"]:
    """Gradient of the mean loss with respect to the input of the final norm."""
    next_labels = F.pad(trained_labels(batch)[:, 1:], (0, 1), value=IGNORE)

    def loss(x: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
        normed = rms_norm(x, base["norm"], spec.config.rms_norm_eps, spec.config.norm_kind)
        rows = divided(normed.flatten(0, 1), spec)
        weight = head(None, base, spec)["weight"]
        cap = spec.config.logit_cap
        logp = linear_logprobs(rows, weight, next_labels.flatten(), cap=cap)
        return -logp.sum() / (next_labels != IGNORE).sum().clamp(min=1)

    return value_and_grad(loss)(x)[1]


def _output_times_dy(
    leaves: dict[str, Any], *, dy: Tensor, base: Base, spec: Spec, i: int, positions: Positions
) -> Float[Tensor, ""]:
    """<layer(x), dy>: its gradients are those of the loss, because dy is the loss's by layer(x)."""
    params = dict(base["layers"][i])
    params |= {n: {**params[n], "weight": w} for n, w in leaves["weights"].items()}
    static, layer_type = layer_spec(spec, i), spec.config.layer_types[i]
    tables, mask = positions.tables[layer_type], positions.masks[layer_type]
    x = leaves["x"]
    attended = attention_block(x, params, {}, *tables, mask, static, None)
    x = add_residual(x, attended, static)
    y = mlp_block(x, params, {}, static, None)
    dtype = torch.promote_types(y.dtype, torch.float32)
    return (y.to(dtype) * dy.to(dtype)).sum()


def _lora_ga_factors(
    gradient: Float[Tensor, "d_out d_in"],
    linear: Mapping[str, Any],
    t: Target,
    settings: InitSettings,
    generator: torch.Generator,
) -> LoRA:
    """A0 and B0 of one projection: right and left singular directions of its gradient."""
    # PEFT's values: q = 4r directions and 4 power iterations.
    rank = min(4 * t.r, *gradient.shape)
    u, s, vh = randomised_svd(gradient, rank, 4, generator)
    for_a, for_b = _directions(t.r, settings.direction, generator)
    a, b, largest = vh[for_a], u[:, for_b] * s[for_b], s[for_b][0]
    if settings.scale == "stable":
        b = b * (b.shape[0] ** 0.25 / settings.stable_gamma**0.5)
    # Without a gradient (`largest` is 0) B stays 0.
    elif settings.scale == "weight_svd" and largest > 0:
        weight = dense(linear["weight"], gradient.dtype).to(gradient.dtype)
        b = b * (torch.linalg.matrix_norm(weight, 2) / largest)
    elif settings.scale == "gd_scale":
        a, b = a / t.scaling, b / t.scaling
    return LoRA(a, b)


def _directions(
    r: int, direction: str, generator: torch.Generator
) -> tuple[Int[Tensor, "r"], Int[Tensor, "r"]]:
    """(indices of the directions for A, for B), among the first 2r."""
    order = torch.arange(2 * r, device="cpu")
    if direction == "ArB2r":
        return order[:r], order[r:]
    if direction == "A2rBr":
        return order[r:], order[:r]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    drawn = torch.randperm(2 * r, generator=generator, device="cpu")[:r]
    return drawn, drawn
