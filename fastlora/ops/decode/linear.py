"""Products of generation: y = gain * (W x + s B A x) + bias, for the rows of one decode step (1 to
64) or for the tokens of prompts.

Up to three matrices of one input are one product, with what surrounds them in a decoder layer:

    x -> RMSNorm (if `norm` is given) -> each matrix with its low-rank term, gain and bias
      -> silu(first) * second (if `gated`; gelu if `gelu`) -> + residual (if given)

The reference is the specification. decode_product runs it, or the kernels that linear_launch.py
chooses from; prompt_product runs torch's matrix products. Nothing here has a gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.decode.product import Product
from fastlora.ops.dispatch import Kernels, use_kernel
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Weight, shape_of
from fastlora.ops.rms_norm import rms_norm
from fastlora.ops.swiglu.swiglu import gate_product


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def product_reference(
    x: Float[Tensor, "b d_in"], product: Product, residual: Float[Tensor, "b d_out"] | None = None
) -> tuple[Float[Tensor, "b _"], ...]:
    """The specification, in x.dtype: one result for each part, or one in all if gated."""
    kind = x.dtype
    if product.norm is not None:
        narrow = product.norm.dtype == kind
        x = rms_norm(x, product.norm, product.eps, "narrow" if narrow else "wide")
    sizes = [shape_of(w)[0] for w in product.weights]
    ys = [F.linear(x, dense(w, kind).to(kind)) for w in product.weights]
    if product.a is not None and product.b is not None:
        low = F.linear(x, product.a.to(kind)).chunk(len(sizes), -1)
        factors = zip(low, product.b.to(kind).split(sizes), product.scalings, strict=True)
        ys = [y + s * F.linear(x_a, b) for y, (x_a, b, s) in zip(ys, factors, strict=True)]
    if product.gain is not None:
        ys = [y * g.to(kind) for y, g in zip(ys, product.gain.split(sizes), strict=True)]
    if product.bias is not None:
        ys = [y + v.to(kind) for y, v in zip(ys, product.bias.split(sizes), strict=True)]
    if product.gated:
        ys = [gate_product(*ys, gelu=product.gelu)]
    return tuple(ys) if residual is None else tuple(y + residual for y in ys)


# ── 2. public functions ───────────────────────────────────────────────────────────────────
@torch.no_grad()
def decode_product(
    x: Float[Tensor, "b d_in"],
    product: Product,
    residual: Float[Tensor, "b d_out"] | None = None,
    clear: Int[Tensor, "words"] | None = None,
    kernels: Kernels = "auto",
) -> tuple[Float[Tensor, "b _"], ...]:
    """The product of x, in x.dtype: one result for each part, or one in all if gated.

    The kernels add up in float32. They need `product.low` filled with EMPTY: it is after
    `prepare_product`, and the next call that has it as `clear` fills it again.

    Args:
        x: contiguous, of as many rows as the product was prepared for.
        product: of `prepare_product`.
        residual: contiguous; added to each result.
        clear: `low` of another product, whose launch on this stream is complete or comes before.
        kernels: "auto", "triton" or "torch", as in ops/dispatch.py.
    """
    if not use_kernel(x, kernels):
        return product_reference(x, product, residual)
    from fastlora.ops.decode.linear_launch import launch_product  # noqa: PLC0415  imports triton

    return launch_product(x, product, residual, clear)


@torch.no_grad()
def prompt_product(
    x: Float[Tensor, "n d_in"], product: Product, residual: Float[Tensor, "n d_out"] | None = None
) -> tuple[Float[Tensor, "n _"], ...]:
    """The product of any number of rows by torch's matrix products, in x.dtype.

    Base and low-rank product share one buffer, so that their sum is rounded once. The number of
    operations is small because a prompt of 2,048 tokens is limited by the host (H200).

    Args:
        x: in the dtype of the product's weights.
        product: of `prepare_product`, for any number of rows.
        residual: added to each result.
    """
    if product.norm is not None:
        if product.norm.dtype == x.dtype:
            x = F.rms_norm(x, x.shape[-1:], product.norm, product.eps)
        else:
            x = rms_norm(x, product.norm, product.eps, "wide")
    sizes = [shape_of(w)[0] for w in product.weights]
    absent = (None,) * len(sizes)
    low = absent if product.a is None else (x @ product.a.t()).chunk(len(sizes), -1)
    split = lambda t: absent if t is None else t.split(sizes)
    gains, biases = split(product.gain), split(product.bias)
    # A residual is the start of the sum if nothing changes the product behind it.
    unchanged = product.gain is None and product.bias is None and not product.gated
    first = residual if unchanged else None
    each = zip(product.weights, low, split(product.b), product.scalings, strict=True)
    ys = [_sum_of_products(x, *term, first) for term in each]
    ys = [y if g is None else y * g for y, g in zip(ys, gains, strict=True)]
    ys = [(y if v is None else y + v).to(x.dtype) for y, v in zip(ys, biases, strict=True)]
    if product.gated:
        gate, up = ys
        gate = F.gelu(gate, approximate="tanh") if product.gelu else F.silu(gate, inplace=True)
        ys = [gate.mul_(up)]
    if residual is not None and first is None:
        ys = [y + residual for y in ys]
    return tuple(ys)


def _sum_of_products(
    x: Float[Tensor, "n d_in"],
    weight: Weight,
    low: Float[Tensor, "n r"] | None,
    b: Float[Tensor, "d_out r"] | None,
    scaling: float,
    first: Float[Tensor, "n d_out"] | None,
) -> Float[Tensor, "n d_out"]:
    """first + scaling * low B' + x W'."""
    wide = dense(weight, x.dtype).t()
    if low is None or b is None:
        return x @ wide if first is None else torch.addmm(first, x, wide)
    # With beta = 0 torch ignores the first argument.
    start, beta = (low.new_empty(1), 0) if first is None else (first, 1)
    return torch.addmm(start, low, b.t(), beta=beta, alpha=scaling).addmm_(x, wide)
