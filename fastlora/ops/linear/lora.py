"""A frozen linear layer plus the up half of a low-rank update: y = x W' + bias + s low B'
(Hu et al. 2021, arXiv:2106.09685; low = x A').

Read downward: the reference is the specification; the op gives the same value with the low-rank
term accumulated into the base product's own buffer, and a derivative that knows W is frozen.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import plain
from fastlora.ops.linear.frozen import backward_product, frozen_linear_reference
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Weight, from_parts, parts, shape_of


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def lora_linear_reference(
    x: Float[Tensor, "*n d_in"],
    x_a: Float[Tensor, "*n r"],
    weight: Weight,
    bias: Float[Tensor, "d_out"] | None,
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """The specification, differentiable in every argument any number of times."""
    return frozen_linear_reference(x, weight, bias) + scaling * F.linear(x_a, b)


# ── 2. op and derivative ──────────────────────────────────────────────────────────────────
# One op, so that a recompute policy can say "keep the projections" and mean one tensor: as two
# products and a sum, the policy would keep both summands (torch's selective checkpoint chooses by
# op, not by name). `x_a` is an input and not computed inside: the backward pass needs it, and would
# otherwise run down_proj's whole base product again for it (6 ms of a 1B step with "full"; H200,
# torch 2.11, 8,192 tokens). The low-rank term is written first and the base product adds to it in
# its own epilogue: the sum is in fp32 and rounded once, no second [n, d_out] tensor exists, and the
# small term's pass over the output is a write where the other order reads and writes.
# Its derivative is an autograd.Function around the raw op, not torch.library.register_autograd: a
# compiled graph then holds the op alone, without a Python frame per call (112 calls a 1B step,
# where the host has some 25 ms for the forward pass). A quantised weight comes as its parts, and is
# a matrix within the op alone (frozen_linear.py says why).
torch.library.define(
    "fastlora::lora_linear",
    "(Tensor x, Tensor x_a, Tensor[] weight, Tensor? bias, Tensor b, float scaling) -> Tensor",
)


@torch.library.impl("fastlora::lora_linear", "CompositeExplicitAutograd")
def _lora_linear(x, x_a, weight, bias, b, scaling):
    if bias is None:  # beta = 0: the first argument is not read
        y = torch.addmm(x_a.new_empty(1), x_a, b.t(), beta=0, alpha=scaling)
    else:
        y = torch.addmm(bias, x_a, b.t(), alpha=scaling)
    return y.addmm_(x, dense(from_parts(weight), x.dtype).t())


@torch.library.register_fake("fastlora::lora_linear")
def _(x, x_a, weight, bias, b, scaling):
    return x.new_empty(x.shape[0], shape_of(from_parts(weight))[0])


def scaled_product(
    x: Float[Tensor, "n k"], y: Float[Tensor, "k m"], scaling: float
) -> Float[Tensor, "n m"]:
    """scaling x y, scaled before it is rounded, in the product's own launch."""
    return torch.addmm(y[:1], x, y, beta=0, alpha=scaling)  # beta = 0: y[:1] is not read


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        # Not by name: where nothing requires a gradient, dynamo takes a forward with as many
        # parameters as it was given arguments for one without ctx (torch 2.11 and 2.13).
        x, x_a, bias, b, scaling, *weight = inputs
        ctx.save_for_backward(x_a, b, *weight)
        ctx.scaling = scaling
        return torch.ops.fastlora.lora_linear(x, x_a, list(weight), bias, b, scaling)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_a, b, *weight = ctx.saved_tensors
        dx = backward_product(dy, *weight) if ctx.needs_input_grad[0] else None
        dlow = scaled_product(dy, b, ctx.scaling)
        db = scaled_product(dy.t(), x_a, ctx.scaling)
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dlow, dbias, db, None, *(None for _ in weight)  # the weight is frozen


# ── 3. what the model calls ───────────────────────────────────────────────────────────────
def lora_linear(
    x: Float[Tensor, "*n d_in"],
    x_a: Float[Tensor, "*n r"],
    weight: Weight,
    bias: Float[Tensor, "d_out"] | None,
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """The adapted projection, in x.dtype; every tensor but a quantised weight's has that dtype.

    Args:
        x: input of the base product.
        low: x (dropped out, where dropout is on) times A'.
        weight: frozen base matrix, dense or quantised.
        bias: of the base, or None; receives a gradient where it asks for one.
        b: up projection.
        scaling: factor of the low-rank term (alpha / r).
    """
    if plain(*parts(weight)):
        return lora_linear_reference(x, x_a, weight, bias, b, scaling)
    flat, flat_low = x.reshape(-1, x.shape[-1]), x_a.reshape(-1, x_a.shape[-1])
    y = _LoRALinear.apply(flat, flat_low, bias, b, scaling, *parts(weight))
    return y.view(*x.shape[:-1], shape_of(weight)[0])  # pyright: ignore
