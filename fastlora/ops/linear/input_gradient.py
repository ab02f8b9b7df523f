"""dxA A + the sum of dy_i W_i: the input gradient of several linear layers that share an input."""

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.launch import implement
from fastlora.ops.linear.fp8 import fp8_input_gradient
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import WeightFP8, from_parts, shape_of


def add_products(
    total: Float[Tensor, "n d_in"] | None,
    ys: Sequence[Float[Tensor, "n _"]],
    matrices: Sequence[Tensor],
    parts: Sequence[int],
) -> Float[Tensor, "n d_in"]:
    """total + y_1 M_1 + y_2 M_2 + ..., in y's dtype; writes to `total`, unless it is None.

    Each product is added in float32 and rounded once. `parts[i]` is the number of tensors of M_i in
    `matrices`, more than 1 if M_i is quantised. A quantised matrix is dequantised for its product
    and then freed. Those in e4m3 come first, because their sum is one product, which cannot add to
    an existing tensor.
    """
    terms = [*zip(ys, map(from_parts, _in_groups(matrices, parts)), strict=True)]
    if in_fp8 := [(y, matrix) for y, matrix in terms if isinstance(matrix, WeightFP8)]:
        of_fp8 = fp8_input_gradient(*zip(*in_fp8, strict=True))
        total = of_fp8 if total is None else total.add_(of_fp8)
    for y, matrix in terms:
        if isinstance(matrix, WeightFP8):
            continue
        wide = dense(matrix, y.dtype)
        total = torch.mm(y, wide) if total is None else total.addmm_(y, wide)
    assert total is not None, "no terms"
    return total


def _in_groups(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [tensors[end - size : end] for end, size in zip(ends, sizes, strict=True)]


torch.library.define(
    "fastlora::sum_of_products", "(Tensor[] ys, Tensor[] matrices, int[] parts) -> Tensor"
)


@implement("fastlora::sum_of_products")
def _sum_of_products(ys, matrices, parts):
    return add_products(None, ys, matrices, parts)


@torch.library.register_fake("fastlora::sum_of_products")
def _(ys, matrices, parts):
    return ys[0].new_empty(ys[0].shape[0], shape_of(from_parts(matrices[: parts[0]]))[1])


def input_gradient(
    dx_a: Float[Tensor, "n r"] | None,
    a: Float[Tensor, "r d_in"] | None,
    dys: Sequence[Float[Tensor, "n _"] | None],
    matrices: Sequence[Sequence[Tensor]],
) -> Float[Tensor, "n d_in"] | None:
    """dxA A + sum of dy_i W_i over the terms that are not None; None if there are no terms.

    Differentiable if create_graph=True.

    Args:
        dx_a: the gradient of all xA_i side by side, or None.
        a: all A_i as one matrix; None without any.
        dys: the gradients of the layers' outputs, each of which may be None.
        matrices: the parts (`weights.parts`) of every W_i.
    """
    terms: list[tuple[Tensor, Sequence[Tensor]]] = []
    if dx_a is not None and a is not None:
        terms.append((dx_a, [a]))
    terms += [(dy, m) for dy, m in zip(dys, matrices, strict=True) if dy is not None]
    if not terms:
        return None
    if torch.is_grad_enabled():  # create_graph=True, but the raw op has no derivative
        return reduce(torch.add, (torch.mm(y, dense(from_parts(m), y.dtype)) for y, m in terms))
    flat, sizes = [x for _, m in terms for x in m], [len(m) for _, m in terms]
    return torch.ops.fastlora.sum_of_products([y for y, _ in terms], flat, sizes)
