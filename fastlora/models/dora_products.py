"""DoRA on one projection (Liu et al. 2024, arXiv:2402.09353): the length of each row is trained."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.models.init_offset import a_with_offset, b_with_offset
from fastlora.models.params import DoRA, Linear, LoRA
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.linear.frozen import frozen_linear
from fastlora.ops.linear.lora import lora_linear


def dora_scale(linear: Linear, lora: DoRA, scaling: float) -> Float[Tensor, "d_out"]:
    """DoRA's m / n: magnitude over the row norms of W + scaling * B A."""
    a, b = a_with_offset(lora, linear), b_with_offset(lora, linear)
    return lora.magnitude / row_norms(linear["weight"], a, b, scaling)


def scaled_rows(
    y: Float[Tensor, "*n d_out"],
    gain: Float[Tensor, "d_out"],
    bias: Float[Tensor, "d_out"] | None,
) -> Float[Tensor, "*n d_out"]:
    scaled = gain * y
    return (scaled if bias is None else scaled + bias).to(y.dtype)


def dora_linear(
    x: Float[Tensor, "*n d_in"],
    dropped: Float[Tensor, "*n d_in"] | None,
    x_a: Float[Tensor, "*n r"],
    linear: Linear,
    lora: LoRA | DoRA,
    gain: Float[Tensor, "d_out"],
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """DoRA: `gain` (m / n) times the adapted product, plus the base's bias.

    Under dropout, y = W x + (gain - 1) W dropped + gain * scaling * B A dropped, as in PEFT.
    """
    weight, bias = linear["weight"], linear.get("bias")
    b = b_with_offset(lora, linear)
    if dropped is None:
        return scaled_rows(lora_linear(x, x_a, weight, None, b, scaling), gain, bias)
    base, masked = _frozen(x, linear, bias, scaling), _frozen(dropped, linear, None, scaling)
    # x_a is without the offset's A0 here, because `_frozen` subtracts the offset.
    update = scaling * F.linear(x_a, lora.b)
    return (base + (gain - 1) * masked + gain * update).to(x.dtype)


def _frozen(
    x: Float[Tensor, "*n d_in"],
    linear: Linear,
    bias: Float[Tensor, "d_out"] | None,
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """The base's product, minus that of its initial offset."""
    y = frozen_linear(x, linear["weight"], bias)
    if "offset" not in linear:
        return y
    return y - scaling * F.linear(F.linear(x, linear["offset"].a), linear["offset"].b)
