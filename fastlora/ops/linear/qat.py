"""A linear layer that computes what it will compute after merging and quantisation:
y = fq(x) fq(m / n * (W + s B A))' + bias   (fq: quant/fake_quantize.py; m / n only for DoRA).

The sum is that of merging (merged_weight.py), so training sees the weights that torchao computes
from the merged checkpoint. Unsloth fake-quantises base, A and B separately; no merged checkpoint
contains that product.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import needs_reference
from fastlora.ops.launch import implement
from fastlora.ops.linear.merged_weight import adapted_weight, low_rank_sum
from fastlora.ops.quant.fake_quantize import (
    SCHEMES,
    fake_quantize,
    fake_quantize_backward,
    rows_per_chunk,
)


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def qat_linear_reference(
    x: Float[Tensor, "*n d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None,
    a: Float[Tensor, "r d_in"] | None,
    b: Float[Tensor, "d_out r"] | None,
    magnitude: Float[Tensor, "d_out"] | None,
    scaling: float,
    scheme: str,
) -> Float[Tensor, "*n d_out"]:
    """The specification, differentiable in every tensor; keeps several copies of the weight."""
    total = _total(weight, a, b, magnitude, scaling)
    return F.linear(_quantised_input(x, scheme), fake_quantize(total, SCHEMES[scheme].weight), bias)


def _quantised_input(x: Tensor, scheme: str) -> Tensor:
    quantiser = SCHEMES[scheme].activation
    return x if quantiser is None else fake_quantize(x, quantiser)


def _total(
    weight: Tensor, a: Tensor | None, b: Tensor | None, magnitude: Tensor | None, scaling: float
) -> Tensor:
    """The quantiser's input: the merged matrix, or the base matrix without an adapter."""
    if a is None or b is None:
        return weight
    return adapted_weight(weight, a, b, magnitude, scaling)


# ── 2. op and derivative ──────────────────────────────────────────────────────────────────
# Forward and backward are opaque ops. A recompute policy can therefore keep y, and never a tensor
# of the weight's size (the sum, its quantised form and the clipping masks take 16 bytes and more
# per element of the base). The backward pass recomputes those from W, A and B, which are in memory
# anyway. Opaque ops also make compiled and eager layers agree bit for bit: in plain torch Inductor
# would round bfloat16 values at other places and move some to the next quantisation step. The
# weight is processed in chunks of 2**24 elements; its rows are quantised independently.
torch.library.define(
    "fastlora::qat_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor? magnitude,"
    " float scaling, str scheme) -> Tensor",
)

torch.library.define(
    "fastlora::qat_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? a, Tensor? b, Tensor? magnitude,"
    " float scaling, str scheme, bool needs_dx) -> Tensor[]",
)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _chunks(weight: Tensor) -> list[slice]:
    step = rows_per_chunk(weight.shape[1])
    return [slice(i, i + step) for i in range(0, weight.shape[0], step)]


@implement("fastlora::qat_linear")
def _qat_linear(x, weight, bias, a, b, magnitude, scaling, scheme):
    quantised = _quantised_weight(weight, a, b, magnitude, scaling, scheme)
    return F.linear(_quantised_input(x, scheme), quantised, bias)


def _quantised_weight(weight, a, b, magnitude, scaling, scheme):
    quantised = torch.empty_like(weight)
    for rows in _chunks(weight):
        part = _total(weight[rows], a, _rows(b, rows), _rows(magnitude, rows), scaling)
        quantised[rows] = fake_quantize(part, SCHEMES[scheme].weight)
    return quantised


@torch.library.register_fake("fastlora::qat_linear")
def _(x, weight, bias, a, b, magnitude, scaling, scheme):
    return x.new_empty(x.shape[0], weight.shape[0])


@implement("fastlora::qat_linear_backward")
def _qat_linear_backward(dy, x, weight, a, b, magnitude, scaling, scheme, needs_dx):
    dx = x.new_empty(0)
    if needs_dx:
        dx = torch.mm(dy, _quantised_weight(weight, a, b, magnitude, scaling, scheme))
        if (quantiser := SCHEMES[scheme].activation) is not None:
            dx = fake_quantize_backward(x, dx, quantiser)
    if a is None:  # nothing is trained through the weight
        return [dx]
    x, da, db = _quantised_input(x, scheme), torch.zeros_like(a), torch.empty_like(b)
    dmagnitude = [] if magnitude is None else [torch.empty_like(magnitude)]
    for rows in _chunks(weight):
        m, dm = _rows(magnitude, rows), [d[rows] for d in dmagnitude]
        dsum = _sum_backward(dy[:, rows].t() @ x, weight[rows], a, b[rows], m, scaling, scheme, dm)
        db[rows] = torch.mm(dsum, a.to(dsum.dtype).t()) * scaling
        da += (torch.mm(b[rows].to(dsum.dtype).t(), dsum) * scaling).to(a.dtype)
    return [dx, da, db, *dmagnitude]


def _sum_backward(dquantised, weight, a, b, magnitude, scaling, scheme, dmagnitude):
    """The gradient of W + s B A from the gradient of the quantised matrix.

    With DoRA, writes the magnitude's gradient to dmagnitude[0].
    """
    total = low_rank_sum(weight, a, b, scaling)
    gain = None
    if magnitude is not None:
        norm = total.norm(dim=-1)
        gain = (magnitude.to(total.dtype) / norm).unsqueeze(-1)
    scaled = (total if gain is None else total * gain).to(weight.dtype)
    dscaled = fake_quantize_backward(scaled, dquantised, SCHEMES[scheme].weight).to(total.dtype)
    if gain is None:
        return dscaled
    dmagnitude[0].copy_((dscaled * total).sum(-1) / norm)
    return dscaled * gain


@torch.library.register_fake("fastlora::qat_linear_backward")
def _(dy, x, weight, a, b, magnitude, scaling, scheme, needs_dx):
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    return [dx, *(torch.empty_like(t) for t in (a, b, magnitude) if t is not None)]


class _QATLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, magnitude, scaling, scheme):
        ctx.save_for_backward(x, weight, a, b, magnitude)
        ctx.scaling, ctx.scheme = scaling, scheme
        return torch.ops.fastlora.qat_linear(x, weight, bias, a, b, magnitude, scaling, scheme)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but the op below is not differentiable
            raise RuntimeError(
                "the fused quantised projection has no second derivative; differentiate"
                " fastlora.functional with torch.func, which runs the reference."
            )
        needs_dx, dbias = ctx.needs_input_grad[0], None
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        dx, *rest = torch.ops.fastlora.qat_linear_backward(
            dy, *ctx.saved_tensors, ctx.scaling, ctx.scheme, needs_dx
        )
        # The op returns no gradients for A, B and the magnitude if they are None.
        da, db, dmagnitude = (*rest, None, None, None)[:3]
        return dx if needs_dx else None, None, dbias, da, db, dmagnitude, None, None


# ── 3. public function ────────────────────────────────────────────────────────────────────
def qat_linear(
    x: Float[Tensor, "*n d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None,
    a: Float[Tensor, "r d_in"] | None,
    b: Float[Tensor, "d_out r"] | None,
    magnitude: Float[Tensor, "d_out"] | None,
    scaling: float,
    scheme: str,
) -> Float[Tensor, "*n d_out"]:
    """The projection of a merged and quantised model, in x.dtype.

    The backward pass keeps x, and no tensor of the weight's size.

    Args:
        x: input.
        weight: frozen base matrix, in x.dtype.
        bias: in x.dtype, or None.
        a: LoRA's A, in the adapter's dtype; None without an adapter.
        b: LoRA's B, in the adapter's dtype; None without an adapter.
        magnitude: DoRA's magnitudes, or None.
        scaling: factor of the low-rank term (alpha / r).
        scheme: a key of `fake_quantize.SCHEMES`.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    if needs_reference(weight):
        return qat_linear_reference(x, weight, bias, a, b, magnitude, scaling, scheme)
    flat = x.reshape(-1, x.shape[-1])
    y = _QATLinear.apply(flat, weight, bias, a, b, magnitude, scaling, scheme)
    return y.view(*x.shape[:-1], weight.shape[0])
