"""Linear layers of one input with a stack of n LoRA adapters, of which each row uses one:
y[i] = x[i] W' + bias + x[i] A[g]' B[g]', where g is the group of row i, the number of its adapter.

The base product is one product over all rows; a quantised W is dequantised once. Low-rank products
run group by group: as one batched product if the groups are equal blocks of rows, otherwise as the
grouped products of experts.py. The gradients of A and B are computed group by group too, so that
each adapter gets its own. The scaling of the low-rank term is in B (models/stacks.py).

The reference is the specification.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import needs_reference
from fastlora.ops.launch import implement
from fastlora.ops.linear.fp8 import fp8_linear
from fastlora.ops.linear.frozen import base_product, frozen_linear_reference
from fastlora.ops.linear.group_products import (
    Groups,
    each_group,
    group_product,
    outer,
    product,
    product_reference,
)
from fastlora.ops.linear.input_gradient import add_products
from fastlora.ops.linear.lora_group import by_branch
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.e4m3 import quantize_rows
from fastlora.ops.quant.weights import Weight, WeightFP8, from_parts, parts, shape_of


class StackedBranch(NamedTuple):
    """One of the layers. `a` and `b` are None if no adapter of the stack adapts it."""

    weight: Weight
    bias: Float[Tensor, "d_out"] | None = None
    a: Float[Tensor, "n r d_in"] | None = None
    b: Float[Tensor, "n d_out r"] | None = None


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def stacked_linears_reference(
    x: Float[Tensor, "*b d_in"],
    branches: Sequence[StackedBranch],
    groups: Groups,
    masked: Sequence[Float[Tensor, "*b d_in"]] | None = None,
) -> list[Float[Tensor, "*b _"]]:
    """The specification, differentiable in every tensor any number of times."""
    ys = []
    for i, (weight, bias, a, b) in enumerate(branches):
        y = frozen_linear_reference(x, weight, bias)
        if a is not None and b is not None:
            source = (x if masked is None else masked[i]).reshape(-1, x.shape[-1])
            update = product_reference(product_reference(source, a, groups), b, groups)
            y = y + update.view(y.shape)
        ys.append(y)
    return ys


# ── 2. ops ────────────────────────────────────────────────────────────────────────────────
# As in lora.py, one op computes base product and low-rank term, so that a recompute policy keeps
# one tensor per projection.
torch.library.define(
    "fastlora::stacked_linear",
    "(Tensor x, Tensor x_a, Tensor[] weight, Tensor? bias, Tensor b, Tensor? offsets,"
    " Tensor? order) -> Tensor",
)

torch.library.define(
    "fastlora::stacked_input_gradient",
    "(Tensor dx_a, Tensor a, Tensor? offsets, Tensor? order, Tensor[] ys, Tensor[] matrices,"
    " int[] parts) -> Tensor",
)


@implement("fastlora::stacked_linear")
def _stacked_linear(x, x_a, weight, bias, b, offsets, order):
    matrix, y = from_parts(weight), each_group(x_a, b, offsets, order)
    if isinstance(matrix, WeightFP8):
        return y.add_(fp8_linear(quantize_rows([x]), matrix, bias, None, None, 1.0, x.dtype))
    # The base product adds to the low-rank term in its epilogue, so no second [m, d_out] exists.
    if bias is not None:
        y.add_(bias)
    return y.addmm_(x, dense(matrix, x.dtype).t())


@implement("fastlora::stacked_input_gradient")
def _stacked_input_gradient(dx_a, a, offsets, order, ys, matrices, parts):
    """dxA[i] A[g] + the sum of y_j W_j, in one buffer; `parts` as in input_gradient.py."""
    return add_products(each_group(dx_a, a.mT, offsets, order), ys, matrices, parts)


@torch.library.register_fake("fastlora::stacked_linear")
def _(x, x_a, weight, bias, b, offsets, order):
    return x.new_empty(x.shape[0], b.shape[1])


@torch.library.register_fake("fastlora::stacked_input_gradient")
def _(dx_a, a, offsets, order, ys, matrices, parts):
    return dx_a.new_empty(dx_a.shape[0], a.shape[2])


# ── 3. derivative ─────────────────────────────────────────────────────────────────────────
class _StackedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # a variable argument list: see _LoRALinear
        """One y per branch, and x_a if it is computed here.

        As an output, x_a is a tensor whose graph a second derivative can follow.

        Args:
            ctx: autograd's context.
            inputs: x [m, d_in]; x_a [m, ranks] if the caller has computed it under dropout masks,
                or None; all A side by side [n, ranks, d_in], or None if x_a is given; offsets and
                order of the groups; the weights as one matrix, or None; the rank of each branch,
                None without an adapter; the number of parts of each weight; whether each branch
                has a bias; then the tensors: the parts of all weights, the biases, the Bs.
        """
        x, x_a, a, offsets, order, fused_weight, ranks, weights, biases, *tensors = inputs
        ctx.set_materialize_grads(False)
        matrices, biases_or_none, bs = by_branch(tensors, ranks, weights, biases)
        computed = x_a is None
        if computed:
            x_a = torch.ops.fastlora.stacked_product(x, a, offsets, order)
        ys = []
        each = zip(matrices, biases_or_none, bs, _columns(x_a, ranks), strict=True)
        for weight, bias, b, columns in each:
            if b is None:
                ys.append(base_product(x, weight, bias))
            else:
                op = torch.ops.fastlora.stacked_linear
                ys.append(op(x, columns, weight, bias, b, offsets, order))
        ctx.static = ranks, weights, biases
        kept = x if computed else None
        ctx.save_for_backward(kept, x_a, a, offsets, order, fused_weight, *tensors)
        return (*ys, x_a) if computed else tuple(ys)

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, x_a, a, offsets, order, fused_weight, *tensors = ctx.saved_tensors
        ranks, weights, biases = ctx.static
        groups, needs = Groups(offsets, order), ctx.needs_input_grad
        dys, more = gradients[: len(ranks)], gradients[len(ranks) :]  # more: of x_a
        matrices, _, bs = by_branch(tensors, ranks, weights, biases)
        with_lora = [
            (dy, b, columns)
            for dy, b, columns in zip(dys, bs, _columns(x_a, ranks), strict=True)
            if b is not None and columns is not None
        ]
        each = [
            torch.zeros_like(columns) if dy is None else product(dy, b.mT, groups)
            for dy, b, columns in with_lora
        ]
        dx_a = each[0] if len(each) == 1 else torch.cat(each, 1)
        if more and more[0] is not None:
            dx_a = dx_a + more[0]
        dbs = [None if dy is None else outer(dy, c, b, groups) for dy, b, c in with_lora]
        da = outer(dx_a, x, a, groups) if a is not None and needs[2] else None
        dx = None
        if needs[0]:
            terms = [(dy, m) for dy, m in zip(dys, matrices, strict=True) if dy is not None]
            if fused_weight is not None and len(terms) == len(dys):
                terms = [(torch.cat(dys, 1), [fused_weight])]
            dx = _input_gradient(dx_a, a, groups, terms)
        bias_dys = [dy for dy, present in zip(dys, biases, strict=True) if present]
        dbiases = [
            dy.sum(0) if needed and dy is not None else None
            for dy, needed in zip(bias_dys, needs[9 + sum(weights) :], strict=False)
        ]
        given_x_a = dx_a if a is None else None
        frozen = [None] * sum(weights)
        return dx, given_x_a, da, *[None] * 6, *frozen, *dbiases, *dbs


def _columns(x_a, ranks):
    """The columns of `x_a` that belong to each branch, or None."""
    pieces = iter(x_a.split([r for r in ranks if r is not None], 1))
    return [None if r is None else next(pieces) for r in ranks]


def _input_gradient(dx_a, a, groups, terms):
    """dxA A (if the op computed xA itself) plus the sum of dy_i W_i."""
    if torch.is_grad_enabled():
        total = 0.0 if a is None else product_reference(dx_a, a.mT, groups)
        for dy, m in terms:
            total = total + torch.mm(dy, dense(from_parts(m), dy.dtype))
        return total if isinstance(total, Tensor) else None
    ys = [dy for dy, _ in terms]
    flat, sizes = [x for _, m in terms for x in m], [len(m) for _, m in terms]
    if a is not None:
        return torch.ops.fastlora.stacked_input_gradient(dx_a, a, *groups, ys, flat, sizes)
    return torch.ops.fastlora.sum_of_products(ys, flat, sizes) if terms else None


# ── 4. public function ────────────────────────────────────────────────────────────────────
def stacked_linears(
    x: Float[Tensor, "b t d_in"],
    branches: Sequence[StackedBranch],
    groups: Groups,
    masked: Sequence[Float[Tensor, "b t d_in"]] | None = None,
    fused_weight: Float[Tensor, "d_out d_in"] | None = None,
) -> list[Float[Tensor, "b t _"]]:
    """One y per branch, in x.dtype. All tensors but those of quantised weights have x.dtype.

    Args:
        x: the input of all layers; its b * t rows belong to the groups.
        branches: the layers, of which at least one is adapted. A bias receives a gradient if it
            requires one, a weight none.
        groups: of the rows.
        masked: for each branch, x under its dropout mask; None: no dropout.
        fused_weight: one matrix of which the weights are consecutive rows, if there is one.
    """
    frozen = [part for branch in branches for part in parts(branch.weight)]
    if needs_reference(*frozen):
        return stacked_linears_reference(x, branches, groups, masked)
    adapted = [i for i, branch in enumerate(branches) if branch.a is not None]
    matrices = [branch.a for branch in branches if branch.a is not None]
    x_a = a = None
    if masked is None:  # all A side by side, so that one product reads x once
        a = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
    else:
        each = [group_product(masked[i], m, groups) for i, m in zip(adapted, matrices, strict=True)]
        x_a = each[0] if len(each) == 1 else torch.cat(each, 1)
    ys = _StackedLinears.apply(
        x.reshape(-1, x.shape[-1]),
        x_a,
        a,
        *groups,
        fused_weight,
        tuple(None if branch.a is None else branch.a.shape[1] for branch in branches),
        tuple(len(parts(branch.weight)) for branch in branches),
        tuple(branch.bias is not None for branch in branches),
        *frozen,
        *(branch.bias for branch in branches if branch.bias is not None),
        *(branch.b for branch in branches if branch.b is not None),
    )
    assert isinstance(ys, tuple)
    return [
        y.view(*x.shape[:-1], shape_of(branch.weight)[0])
        for y, branch in zip(ys[: len(branches)], branches, strict=True)
    ]
