"""Linear layers of one input, each with the up half of a low-rank update where it has one:
y_i = x W_i' + bias_i + s_i low_i B_i', low = x A' for the A of all (Hu et al. 2021,
arXiv:2106.09685). What q, k and v are; o; and, their low-rank terms left to SwiGLU, gate and up.
With dropout each A sees x under a mask of its own (masked_x_a.py), and every W all of it.

Read downward: the reference is the specification; the op's derivative forms the input's gradient,
dlow A + sum of dy_i W_i, in one buffer, to which every product adds in its own epilogue. As
products and a sum, the RMSNorm behind q, k and v reads four tensors where it reads one.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import plain
from fastlora.ops.linear.frozen import frozen_linear, frozen_linear_reference
from fastlora.ops.linear.lora import lora_linear, lora_linear_reference, scaled_product
from fastlora.ops.linear.masked_lora import (
    Masks,
    Segments,
    add_gradients,
    masked_x_a_reference,
    takes,
)
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Weight, from_parts, parts, shape_of


class Branch(NamedTuple):
    """One of the layers. Its low-rank term reads the next r columns of `x_a`; b None: there is
    none."""

    weight: Weight
    bias: Float[Tensor, "d_out"] | None = None
    b: Float[Tensor, "d_out r"] | None = None
    scaling: float = 1.0


Outputs = tuple[Float[Tensor, "*n r"] | None, list[Float[Tensor, "*n _"]]]


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def lora_linears_reference(
    x: Float[Tensor, "*n d_in"],
    matrices: Sequence[Float[Tensor, "_ d_in"]],
    branches: Sequence[Branch],
    masks: Masks | None = None,
) -> Outputs:
    """The specification, differentiable in every tensor any number of times."""
    return _one_by_one(x, matrices, branches, masks, frozen_linear_reference, lora_linear_reference)


def _one_by_one(
    x: Float[Tensor, "*n d_in"],
    matrices: Sequence[Float[Tensor, "_ d_in"]],
    branches: Sequence[Branch],
    masks: Masks | None,
    frozen: Callable[..., Tensor],
    adapted: Callable[..., Tensor],
) -> Outputs:
    x_a = None
    if matrices and masks is None:
        x_a = F.linear(x, torch.cat([*matrices]))
    elif matrices and masks is not None:
        x_a = masked_x_a_reference(x, matrices, masks)
    ys = []
    each = zip(branches, _columns(x_a, [branch.b for branch in branches]), strict=True)
    for (weight, bias, _, scaling), (b, own) in each:
        y = frozen(x, weight, bias) if b is None else adapted(x, own, weight, bias, b, scaling)
        ys.append(y)
    return x_a, ys


def _columns(x_a, bs):
    """For each branch its B with the columns of `x_a` that it multiplies, or twice None."""
    first, found = 0, []
    for b in bs:
        if b is None:
            found.append((None, None))
            continue
        assert x_a is not None, "a low-rank term needs an A"
        found.append((b, x_a[..., first : first + b.shape[1]]))
        first += b.shape[1]
    return found


# ── 2. op and derivative ──────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::sum_of_products", "(Tensor[] ys, Tensor[] matrices, int[] parts) -> Tensor"
)


@torch.library.impl("fastlora::sum_of_products", "CompositeExplicitAutograd")
def _sum_of_products(ys, matrices, parts):
    """y_1 M_1 + y_2 M_2 + ..., summed in float32 product by product; a quantised M_i comes as
    parts[i] of `matrices` and is a matrix for its own product alone."""
    total = None
    for y, matrix in zip(ys, _in_groups(matrices, parts), strict=True):
        wide = dense(from_parts(matrix), y.dtype)
        total = torch.mm(y, wide) if total is None else total.addmm_(y, wide)
    return total


@torch.library.register_fake("fastlora::sum_of_products")
def _(ys, matrices, parts):
    return ys[0].new_empty(ys[0].shape[0], shape_of(from_parts(matrices[: parts[0]]))[1])


def _in_groups(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [tensors[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # not by name: see _LoRALinear
        """`keys` and `segments`: of the masks, where A sees x under masks; `whole`: all weights as
        one, where they lie so; `joint`: whether all ys receive their gradients through the tensor
        that comes last; `tensors`: the weights' parts, so many as `weights` says for each; a bias
        for each that `biases` says has one; B for each that has a scaling."""
        x, a, keys, segments, whole, joint, scalings, weights, biases, *tensors = inputs
        ctx.set_materialize_grads(False)
        matrices, own_biases, bs = _sorted(tensors, scalings, weights, biases)
        if keys is None:
            x_a = None if a is None else torch.mm(x, a.t())
        else:
            x_a = torch.ops.fastlora.masked_x_a(x, a, keys, *segments)
        ys = []
        each = zip(matrices, own_biases, _columns(x_a, bs), scalings, strict=True)
        for weight, bias, (b, columns), scaling in each:
            if b is None:
                ys.append(_frozen(x, weight, bias))
            else:
                op = torch.ops.fastlora.lora_linear
                ys.append(op(x, columns, weight, bias, b, scaling))
        ctx.static = segments, joint, scalings, weights, biases
        ctx.save_for_backward(None if a is None else x, a, keys, whole, x_a, *tensors)
        if not joint:
            return *ys, x_a
        ctx.mark_non_differentiable(*ys)
        stands_for_all = x.new_empty(()).expand(x.shape[0], sum(y.shape[1] for y in ys))
        # low, which may be None, comes last: dynamo (torch 2.13) counts outputs without the Nones
        # when it looks for those that were marked.
        return *ys, stands_for_all, x_a

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, keys, whole, x_a, *tensors = ctx.saved_tensors
        segments, joint, scalings, weights, biases = ctx.static
        matrices, _, bs = _sorted(tensors, scalings, weights, biases)
        needs_x, needs_a, _, _, _, _, _, _, _, *needs = ctx.needs_input_grad
        *dys, dlow = gradients
        together = None
        if joint:
            *_, together = dys
            dys = together.split([shape_of(from_parts(m))[0] for m in matrices], 1)
        stacked = whole is not None and needs_x and all(dy is not None for dy in dys)
        if stacked and together is None:
            # One buffer, which Inductor has whatever makes dys write to.
            together = torch.cat(dys, 1)
            dys = together.split([dy.shape[1] for dy in dys], 1)
        own = [
            (dy, b, columns, scaling)
            for dy, (b, columns), scaling in zip(dys, _columns(x_a, bs), scalings, strict=True)
            if scaling is not None
        ]
        if own:
            each = [
                torch.zeros_like(columns) if dy is None else scaled_product(dy, b, scaling)
                for dy, b, columns, scaling in own
            ]
            inner = torch.cat(each, 1) if len(each) > 1 else each[0]
            dlow = inner if dlow is None else dlow + inner
        through = dlow if keys is None else None  # under masks it is added below
        terms = ([together], [[whole]]) if stacked else (dys, matrices)
        dx = _input_gradient(through, a, *terms) if needs_x else None
        if keys is None or dlow is None:
            da = torch.mm(dlow.t(), x) if needs_a and dlow is not None else None
        else:
            dx, da = add_gradients(dx, dlow, x, a, keys, segments, needs_x, needs_a)
        of_biases = [dy for dy, there in zip(dys, biases, strict=True) if there]
        dbiases = [
            dy.sum(0) if needed and dy is not None else None
            for dy, needed in zip(of_biases, needs[sum(weights) :], strict=False)
        ]
        dbs = [
            None if dy is None else scaled_product(dy.t(), columns, scaling)
            for dy, _, columns, scaling in own
        ]
        return dx, da, *[None] * 7, *(None for _ in range(sum(weights))), *dbiases, *dbs


def _sorted(tensors, scalings, weights, biases):
    """(weights as parts, biases or None, B or None), one of each for each branch."""
    rest = list(tensors)
    take = lambda n: [rest.pop(0) for _ in range(n)]
    matrices = [take(n) for n in weights]
    own_biases = [rest.pop(0) if there else None for there in biases]
    return matrices, own_biases, [None if s is None else rest.pop(0) for s in scalings]


def _frozen(x, weight, bias):
    """The base product alone: torch's, or the op that a recompute policy knows."""
    if len(weight) > 1:
        return torch.ops.fastlora.quantized_linear(x, weight, bias)
    return torch.mm(x, weight[0].t()) if bias is None else torch.addmm(bias, x, weight[0].t())


def _input_gradient(dlow, a, dys, matrices):
    """dlow A + sum of dy_i W_i, of what there is; differentiable where a graph is being made."""
    terms = [(dlow, [a])] if dlow is not None else []
    terms += [(dy, m) for dy, m in zip(dys, matrices, strict=True) if dy is not None]
    if not terms:
        return None
    if torch.is_grad_enabled():  # create_graph=True: the raw op has no derivative
        return reduce(torch.add, (torch.mm(y, dense(from_parts(m), y.dtype)) for y, m in terms))
    flat, sizes = [x for _, m in terms for x in m], [len(m) for _, m in terms]
    return torch.ops.fastlora.sum_of_products([y for y, _ in terms], flat, sizes)


# ── 3. what the model calls ───────────────────────────────────────────────────────────────
def lora_linears(
    x: Float[Tensor, "*n d_in"],
    matrices: Sequence[Float[Tensor, "_ d_in"]],
    branches: Sequence[Branch],
    masks: Masks | None = None,
    whole: Float[Tensor, "d_out d_in"] | None = None,
) -> Outputs:
    """(low, one y for each branch), in x.dtype; every tensor but a quantised weight's has it.

    Args:
        x: the input of all.
        matrices: every A, in the branches' order; one product forms all of `x_a`, x read once.
            A branch's B may multiply the columns of several.
        branches: frozen weights, each with its bias and B where it has them. Biases receive a
            gradient where they ask for one.
        masks: how each A sees x; None: all see all of it. Where no kernel runs, a masked copy of x
            is kept for each A that has a mask.
        whole: the branches' weights one under the other, where they lie so: their part of x's
            gradient is then one product.
    """
    return _linears(x, matrices, branches, masks, whole, joint=False)[:2]


def joint_lora_linears(
    x: Float[Tensor, "*n d_in"],
    matrices: Sequence[Float[Tensor, "_ d_in"]],
    branches: Sequence[Branch],
    masks: Masks | None,
    whole: Float[Tensor, "d_out d_in"] | None,
) -> tuple[list[Float[Tensor, "*n _"]], Float[Tensor, "*n d_out"] | None]:
    """The ys of `lora_linears`, and a tensor that stands for all of them side by side, for an op
    that reads them all and forms their gradients in one buffer.

    That tensor has their shape and dtype but no memory of its own; its gradient is theirs, and they
    receive none. None in its place: they receive their own, as under torch.func, or where masks
    have no kernel. The arguments are those of `lora_linears`.
    """
    _, ys, joint = _linears(x, matrices, branches, masks, whole, joint=True)
    return ys, joint


def _linears(
    x: Tensor,
    matrices: Sequence[Tensor],
    branches: Sequence[Branch],
    masks: Masks | None,
    whole: Tensor | None,
    *,
    joint: bool,
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    frozen = [part for branch in branches for part in parts(branch.weight)]
    if plain(*frozen):
        return *lora_linears_reference(x, matrices, branches, masks), None
    keys, segments = None, None
    if matrices and masks is not None:
        ranks = tuple(a.shape[0] for a in matrices)
        if not (masks.fused and takes(x.dtype, *ranks)):
            return *_one_by_one(x, matrices, branches, masks, frozen_linear, lora_linear), None
        keys, segments = masks.keys, Segments(ranks, masks.slots, masks.p)
    a = None if not matrices else matrices[0] if len(matrices) == 1 else torch.cat([*matrices])
    if a is None and (len(branches) == 1 or not torch.is_grad_enabled()):
        ys = [frozen_linear(x, branch.weight, branch.bias) for branch in branches]
        return None, ys, None
    *ys, x_a = _LoRALinears.apply(  # pyright: ignore
        x.reshape(-1, x.shape[-1]),
        a,
        keys,
        segments,
        whole,
        joint,
        tuple(None if branch.b is None else branch.scaling for branch in branches),
        tuple(len(parts(branch.weight)) for branch in branches),
        tuple(branch.bias is not None for branch in branches),
        *frozen,
        *(branch.bias for branch in branches if branch.bias is not None),
        *(branch.b for branch in branches if branch.b is not None),
    )
    shaped = lambda y: y.view(*x.shape[:-1], y.shape[-1])
    x_a, ys = None if x_a is None else shaped(x_a), [shaped(y) for y in ys]
    return x_a, ys[: len(branches)], ys[-1] if joint else None
