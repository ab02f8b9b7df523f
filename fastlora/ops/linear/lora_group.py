"""Several linear layers of one input, with or without LoRA: y_i = x W_i' + bias_i + s_i xA_i B_i',
where one product computes xA = x A' for all A (Hu et al. 2021, arXiv:2106.09685).

The model uses it for q, k and v, for o alone, and for gate and up, whose low-rank terms the SwiGLU
kernel adds. With dropout, each A sees x under its own mask (masked_lora.py); every W sees all of x.

The reference is the specification. The op's backward pass computes the input's gradient, dxA A +
sum of dy_i W_i, in one buffer, to which each product adds in its epilogue. Computed separately and
summed, RMSNorm's backward pass would have to read four gradient tensors instead of one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import needs_reference
from fastlora.ops.linear.frozen import base_product, frozen_linear, frozen_linear_reference
from fastlora.ops.linear.input_gradient import input_gradient
from fastlora.ops.linear.lora import lora_linear, lora_linear_reference
from fastlora.ops.linear.low_rank_gradients import layer_gradients
from fastlora.ops.linear.masked_lora import (
    Masks,
    Segments,
    add_gradients,
    kernel_supports,
    masked_x_a_reference,
)
from fastlora.ops.linear.times_a import times_a
from fastlora.ops.quant.e4m3 import quantize_rows
from fastlora.ops.quant.weights import Weight, WeightFP8, from_parts, parts, shape_of


class Branch(NamedTuple):
    """One of the layers.

    Its low-rank term multiplies the next r columns of `x_a`, after those of the branches before it.
    `b` is None if the layer has no low-rank term.
    """

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
    for (weight, bias, _, scaling), (b, columns) in each:
        y = frozen(x, weight, bias) if b is None else adapted(x, columns, weight, bias, b, scaling)
        ys.append(y)
    return x_a, ys


def _columns(x_a, bs):
    """For each branch, (B, the columns of `x_a` that it multiplies), or (None, None) without B."""
    first, pairs = 0, []
    for b in bs:
        if b is None:
            pairs.append((None, None))
            continue
        assert x_a is not None, "a low-rank term needs an A"
        pairs.append((b, x_a[..., first : first + b.shape[1]]))
        first += b.shape[1]
    return pairs


# ── 2. derivative ─────────────────────────────────────────────────────────────────────────
class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # a variable argument list: see _LoRALinear
        """(*ys, x_a), or with `joint` (*ys, placeholder, x_a).

        Args:
            ctx: autograd's context.
            inputs: x; all A as one matrix, or None; the masks' keys and segments, or None; the
                weights as one matrix, or None; `fused`; `joint`; one scaling per branch, None
                without B; the number of parts of each weight; whether each branch has a bias; then
                the tensors: the parts of all weights, the biases, the Bs.
        """
        x, a, keys, segments, fused_weight, fused, joint, *rest = inputs
        scalings, weights, biases, *tensors = rest
        ctx.set_materialize_grads(False)
        matrices, biases_or_none, bs = by_branch(tensors, scalings, weights, biases)
        if keys is None:
            x_a = None if a is None else times_a(x, a)
        else:
            x_a = torch.ops.fastlora.masked_x_a(x, a, keys, *segments)
        ys, rows = [], None
        if all(isinstance(from_parts(weight), WeightFP8) for weight in matrices):
            rows = quantize_rows([x])
        each = zip(matrices, biases_or_none, _columns(x_a, bs), scalings, strict=True)
        for weight, bias, (b, columns), scaling in each:
            if rows is not None:
                low_rank = (columns, b, 1.0 if scaling is None else scaling)
                ys.append(torch.ops.fastlora.fp8_linear(*rows, weight, bias, *low_rank, x.dtype))
            elif b is None:
                ys.append(base_product(x, weight, bias))
            else:
                op = torch.ops.fastlora.lora_linear
                ys.append(op(x, columns, weight, bias, b, scaling))
        ctx.static = segments, fused, joint, scalings, weights, biases
        ctx.save_for_backward(None if a is None else x, a, keys, fused_weight, x_a, *tensors)
        if not joint:
            return *ys, x_a
        ctx.mark_non_differentiable(*ys)
        placeholder = x.new_empty(()).expand(x.shape[0], sum(y.shape[1] for y in ys))
        # x_a comes last because it may be None: dynamo (torch 2.13) does not count Nones when it
        # matches the marked tensors with outputs by position.
        return *ys, placeholder, x_a

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, keys, fused_weight, x_a, *tensors = ctx.saved_tensors
        segments, fused, joint, scalings, weights, biases = ctx.static
        matrices, _, bs = by_branch(tensors, scalings, weights, biases)
        needs_x, needs_a, _, _, _, _, _, _, _, _, *needs = ctx.needs_input_grad
        *dys, dx_a = gradients
        dy_all = None
        if joint:
            *_, dy_all = dys
            dys = dy_all.split([shape_of(from_parts(m))[0] for m in matrices], 1)
        # With a fused weight, one product replaces the sum of dy_i W_i, if every y has a gradient.
        one_product = fused_weight is not None and needs_x and all(dy is not None for dy in dys)
        if one_product and dy_all is None:
            # In compiled code this copies nothing: the kernels that compute dys write into it.
            dy_all = torch.cat(dys, 1)
            dys = dy_all.split([dy.shape[1] for dy in dys], 1)
        # x_a's gradient: from the low-rank terms of the branches and, if the caller also uses x_a
        # (the SwiGLU kernel does), from there.
        widths = [shape_of(from_parts(m))[0] for m in matrices]
        low_rank = dys, dy_all, widths, bs, x_a, scalings
        from_branches, dbs = layer_gradients(*low_rank, fused=fused)
        if from_branches is not None:
            dx_a = from_branches if dx_a is None else dx_a + from_branches
        dx_a_term = dx_a if keys is None else None  # with masks, add_gradients adds it below
        if one_product and fused_weight is not None:
            dys_of_x, of_x = [dy_all], [[fused_weight]]
        else:
            dys_of_x, of_x = dys, matrices
        dx = input_gradient(dx_a_term, a, dys_of_x, of_x) if needs_x else None
        if keys is None or dx_a is None:
            da = torch.mm(dx_a.t(), x) if needs_a and dx_a is not None else None
        else:
            dx, da = add_gradients(dx, dx_a, x, a, keys, segments, needs_x, needs_a)
        # `needs` begins with the weights' parts, which are frozen, then has one entry per bias.
        bias_dys = [dy for dy, present in zip(dys, biases, strict=True) if present]
        dbiases = [
            dy.sum(0) if needed and dy is not None else None
            for dy, needed in zip(bias_dys, needs[sum(weights) :], strict=False)
        ]
        return dx, da, *[None] * 8, *(None for _ in range(sum(weights))), *dbiases, *dbs


def by_branch(tensors, terms, weights, biases):
    """(parts of the weight, bias or None, B or None): three lists with one entry per branch.

    Args:
        tensors: of all branches: the parts of the weights, then the biases, then every B.
        terms: None for each branch without B.
        weights: the number of parts of each weight.
        biases: whether each branch has a bias.
    """
    rest = list(tensors)
    take = lambda n: [rest.pop(0) for _ in range(n)]
    matrices = [take(n) for n in weights]
    biases_or_none = [rest.pop(0) if present else None for present in biases]
    return matrices, biases_or_none, [None if term is None else rest.pop(0) for term in terms]


# ── 3. public functions ───────────────────────────────────────────────────────────────────
def lora_linears(
    x: Float[Tensor, "*n d_in"],
    matrices: Sequence[Float[Tensor, "_ d_in"]],
    branches: Sequence[Branch],
    masks: Masks | None = None,
    fused_weight: Float[Tensor, "d_out d_in"] | None = None,
    *,
    fused: bool = False,
) -> Outputs:
    """(x_a, one y per branch), in x.dtype. All tensors but those of quantised weights have x.dtype.

    `x_a` is x times all A', side by side, or None without any A.

    Args:
        x: the input of all layers.
        matrices: every A, in the branches' order. One product computes `x_a`, so x is read once.
            A branch's B may multiply the columns of several A (an adapter with an init offset).
        branches: the frozen weights, with bias and B or None. A bias receives a gradient if it
            requires one.
        masks: the dropout mask under which each A sees x; None: no dropout. If the kernels do not
            support it, autograd keeps a masked copy of x for each A with a mask.
        fused_weight: one matrix of which the branches' weights are consecutive rows, if there is
            one. The weights' part of x's gradient is then one product.
        fused: whether Triton kernels may run. `masks` says it for those of dropout.
    """
    return _linears(x, matrices, branches, masks, fused_weight, fused=fused, joint=False)[:2]


def joint_lora_linears(
    x: Float[Tensor, "*n d_in"],
    matrices: Sequence[Float[Tensor, "_ d_in"]],
    branches: Sequence[Branch],
    masks: Masks | None,
    fused_weight: Float[Tensor, "d_out d_in"] | None,
    *,
    fused: bool = False,
) -> tuple[list[Float[Tensor, "*n _"]], Float[Tensor, "*n d_out"] | None]:
    """(the ys of `lora_linears`, a placeholder for all ys side by side, or None).

    For an op that reads all ys and computes their gradients in one buffer, as attention does for q,
    k and v. The op returns that buffer as the placeholder's gradient, and the ys receive none. The
    placeholder has the shape and dtype of the concatenated ys, but no memory. If it is None, the ys
    receive their gradients as usual: under torch.func, and if no kernel supports the masks.

    The arguments are those of `lora_linears`.
    """
    _, ys, joint = _linears(x, matrices, branches, masks, fused_weight, fused=fused, joint=True)
    return ys, joint


def _linears(
    x: Tensor,
    matrices: Sequence[Tensor],
    branches: Sequence[Branch],
    masks: Masks | None,
    fused_weight: Tensor | None,
    *,
    fused: bool,
    joint: bool,
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    frozen = [part for branch in branches for part in parts(branch.weight)]
    if needs_reference(*frozen):
        return *lora_linears_reference(x, matrices, branches, masks), None
    keys, segments = None, None
    if matrices and masks is not None:
        ranks = tuple(a.shape[0] for a in matrices)
        if not (masks.fused and kernel_supports(x.dtype, *ranks)):
            return *_one_by_one(x, matrices, branches, masks, frozen_linear, lora_linear), None
        keys, segments = masks.keys, Segments(ranks, masks.slots, masks.p)
    # All A as one matrix, so that one product reads x once.
    a = None if not matrices else matrices[0] if len(matrices) == 1 else torch.cat([*matrices])
    # The op saves work only in the backward pass of several layers, or if there is an x_a.
    if a is None and (len(branches) == 1 or not torch.is_grad_enabled()):
        ys = [frozen_linear(x, branch.weight, branch.bias) for branch in branches]
        return None, ys, None
    *ys, x_a = _LoRALinears.apply(  # pyright: ignore
        x.reshape(-1, x.shape[-1]),
        a,
        keys,
        segments,
        fused_weight,
        fused,
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
