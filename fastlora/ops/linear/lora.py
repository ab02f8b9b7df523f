"""A frozen linear layer plus LoRA's B: y = x W' + bias + s xA B' (Hu et al. 2021,
arXiv:2106.09685), where the caller has computed xA = x A'.

The reference is the specification. The op gives the same value, accumulates both terms in one
buffer, and its backward pass computes no gradient of W.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import needs_reference
from fastlora.ops.launch import implement
from fastlora.ops.linear.fp8 import fp8_linear
from fastlora.ops.linear.frozen import backward_product, frozen_linear_reference
from fastlora.ops.linear.low_rank_gradients import layer_gradients
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.e4m3 import quantize_rows
from fastlora.ops.quant.weights import Weight, WeightFP8, from_parts, parts, shape_of


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
# This is one op so that a recompute policy keeps one tensor per projection. torch's selective
# checkpointing chooses by op: of two products and a sum it would keep both summands.
#
# `x_a` is an input of the op, because the backward pass needs it. If the op computed it inside, a
# recomputed layer would repeat down_proj's base product to get it (6 ms of a 1B step with "full";
# H200, torch 2.11, 8,192 tokens).
#
# The low-rank term is written first, and the base product adds to it in its epilogue. The sum is
# then in fp32 and rounded once, and no second [n, d_out] tensor exists. In the other order the
# low-rank product would have to read the output as well as write it.
#
# The derivative is an autograd.Function around the raw op, not torch.library.register_autograd. A
# compiled graph then holds only the op and runs no Python frame per call (112 calls per step of 1B,
# in which the host has about 25 ms for the forward pass).
#
# A quantised weight is passed as its parts and dequantised inside the op (frozen.py says why).
torch.library.define(
    "fastlora::lora_linear",
    "(Tensor x, Tensor x_a, Tensor[] weight, Tensor? bias, Tensor b, float scaling) -> Tensor",
)


@implement("fastlora::lora_linear")
def _lora_linear(x, x_a, weight, bias, b, scaling):
    matrix = from_parts(weight)
    if isinstance(matrix, WeightFP8):
        return fp8_linear(quantize_rows([x]), matrix, bias, x_a, b, scaling, x.dtype)
    if bias is None:  # with beta = 0 torch ignores the first argument
        y = torch.addmm(x_a.new_empty(1), x_a, b.t(), beta=0, alpha=scaling)
    else:
        y = torch.addmm(bias, x_a, b.t(), alpha=scaling)
    return y.addmm_(x, dense(matrix, x.dtype).t())


@torch.library.register_fake("fastlora::lora_linear")
def _(x, x_a, weight, bias, b, scaling):
    return x.new_empty(x.shape[0], shape_of(from_parts(weight))[0])


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        # A variable argument list on purpose. If no input requires a gradient, dynamo compares the
        # number of parameters with the number of arguments, and if they are equal it assumes that
        # forward has no ctx (torch 2.11 and 2.13).
        x, x_a, bias, b, scaling, fused, *weight = inputs
        ctx.save_for_backward(x_a, b, *weight)
        ctx.scaling, ctx.fused = scaling, fused
        return torch.ops.fastlora.lora_linear(x, x_a, list(weight), bias, b, scaling)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_a, b, *weight = ctx.saved_tensors
        dx = backward_product(dy, *weight) if ctx.needs_input_grad[0] else None
        dx_a, (db,) = layer_gradients(
            [dy], None, [dy.shape[1]], [b], x_a, [ctx.scaling], fused=ctx.fused
        )
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dx_a, dbias, db, None, None, *(None for _ in weight)  # the weight is frozen


# ── 3. public function ────────────────────────────────────────────────────────────────────
def lora_linear(
    x: Float[Tensor, "*n d_in"],
    x_a: Float[Tensor, "*n r"],
    weight: Weight,
    bias: Float[Tensor, "d_out"] | None,
    b: Float[Tensor, "d_out r"],
    scaling: float,
    *,
    fused: bool = False,
) -> Float[Tensor, "*n d_out"]:
    """The adapted projection in x.dtype. All tensors but those of a quantised weight have x.dtype.

    Args:
        x: input of the base product.
        x_a: x (after dropout) times A'.
        weight: frozen base matrix, dense or quantised.
        bias: the base layer's bias, or None; receives a gradient if it requires one.
        b: LoRA's B.
        scaling: factor of the low-rank term (alpha / r).
        fused: whether Triton kernels may run.
    """
    if needs_reference(*parts(weight)):
        return lora_linear_reference(x, x_a, weight, bias, b, scaling)
    flat, flat_x_a = x.reshape(-1, x.shape[-1]), x_a.reshape(-1, x_a.shape[-1])
    y = _LoRALinear.apply(flat, flat_x_a, bias, b, scaling, fused, *parts(weight))
    return y.view(*x.shape[:-1], shape_of(weight)[0])  # pyright: ignore
