"""A linear layer with a frozen matrix: y = x W' + bias, W dense or quantised.

For a quantised W, each op dequantises the matrix, multiplies, and frees it. The backward pass keeps
the quantised bytes and dequantises again. These are custom ops because torch.compile must not look
inside: its partitioner would keep the forward pass's dense matrix for the backward pass, which
takes 16 bits per element and not 4.

With a matrix in e4m3 nothing is dequantised, and x is rounded too (fp8.py).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import needs_reference
from fastlora.ops.launch import implement
from fastlora.ops.linear.fp8 import exact_dtype, fp8_input_gradient, fp8_linear
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.e4m3 import quantize_rows, rounded_rows
from fastlora.ops.quant.weights import Weight, WeightFP8, from_parts, parts, shape_of


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def frozen_linear_reference(
    x: Float[Tensor, "*n d_in"], weight: Weight, bias: Float[Tensor, "d_out"] | None
) -> Float[Tensor, "*n d_out"]:
    """The specification, differentiable any number of times; autograd keeps the dense matrix.

    With a weight in e4m3 x is rounded too. Its derivative is that of the unrounded product: the
    op's backward pass also rounds the gradient.
    """
    if not isinstance(weight, WeightFP8):
        return F.linear(x, dense(weight, x.dtype), bias)
    wide = exact_dtype(x.dtype)
    if wide == x.dtype:
        return F.linear(rounded_rows(x), dense(weight, wide), bias)
    y = F.linear(rounded_rows(x.to(wide)), dense(weight, wide)).to(x.dtype)
    return y if bias is None else y + bias


# ── 2. ops and derivative ─────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::quantized_linear", "(Tensor x, Tensor[] weight, Tensor? bias) -> Tensor"
)

torch.library.define("fastlora::quantized_mm", "(Tensor y, Tensor[] weight) -> Tensor")


@implement("fastlora::quantized_linear")
def _quantized_linear(x, weight, bias):
    matrix = from_parts(weight)
    if isinstance(matrix, WeightFP8):
        return fp8_linear(quantize_rows([x]), matrix, bias, None, None, 1.0, x.dtype)
    return F.linear(x, dense(matrix, x.dtype), bias)


@implement("fastlora::quantized_mm")
def _quantized_mm(y, weight):
    matrix = from_parts(weight)
    if isinstance(matrix, WeightFP8):
        return fp8_input_gradient([y], [matrix])
    return torch.mm(y, dense(matrix, y.dtype))


@torch.library.register_fake("fastlora::quantized_linear")
def _(x, weight, bias):
    return x.new_empty(x.shape[0], shape_of(from_parts(weight))[0])


@torch.library.register_fake("fastlora::quantized_mm")
def _(y, weight):
    return y.new_empty(y.shape[0], shape_of(from_parts(weight))[1])


def backward_product(dy: Float[Tensor, "n d_out"], *weight: Tensor) -> Float[Tensor, "n d_in"]:
    """dy W, the gradient of the input, from the parts of a weight; differentiable in dy."""
    if len(weight) == 1 or torch.is_grad_enabled():  # create_graph=True
        return torch.mm(dy, dense(from_parts(weight), dy.dtype))
    return torch.ops.fastlora.quantized_mm(dy, list(weight))


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # a variable argument list: see _LoRALinear
        x, bias, *weight = inputs
        ctx.save_for_backward(*weight)
        return torch.ops.fastlora.quantized_linear(x, list(weight), bias)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = ctx.saved_tensors
        dx = backward_product(dy, *weight) if ctx.needs_input_grad[0] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, *(None for _ in weight)


def base_product(x, weight, bias):
    """x W' + bias, of a weight's parts, without a derivative. A quantised weight needs the op that
    recompute policies know."""
    if len(weight) > 1:
        return torch.ops.fastlora.quantized_linear(x, weight, bias)
    return torch.mm(x, weight[0].t()) if bias is None else torch.addmm(bias, x, weight[0].t())


# ── 3. public function ────────────────────────────────────────────────────────────────────
def frozen_linear(
    x: Float[Tensor, "*n d_in"], weight: Weight, bias: Float[Tensor, "d_out"] | None = None
) -> Float[Tensor, "*n d_out"]:
    """x W' + bias in x.dtype; the backward pass keeps no dequantised matrix.

    With a dense weight this is torch's linear layer. A quantised weight receives no gradient; the
    bias receives one if it requires one.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if needs_reference():
        return frozen_linear_reference(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = _QuantizedLinear.apply(flat, bias, *parts(weight))
    return y.view(*x.shape[:-1], shape_of(weight)[0])  # pyright: ignore
