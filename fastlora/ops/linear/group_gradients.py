"""The gradients of a matrix M by group of rows, where y[i] = scaling * x[i] M' + (anything).

The gradient of M from group g is the sum of scaling * dy[i]' x[i] over the rows of g. The ordinary
backward pass computes the same products and adds all groups up. `with_group_gradients` returns y
unchanged. Its derivative computes the gradients of all groups and gives them to sinks: tensors that
take no part in the forward pass, and whose autograd "gradient" is the quantity that is wanted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.count_sketch import count_sketch
from fastlora.ops.linear.experts import grouped_linear, grouped_lora_product
from fastlora.ops.linear.group_products import Groups


class Sink(NamedTuple):
    """Says what is computed from the gradients [n, o, k] of a matrix, one for each of n groups.

    Either `each` or `probe` is set. The autograd gradient of `each` is these gradients themselves.
    That of a probe [n] is their squared norms, and that of a probe [n, s] their count sketches, for
    which `key` is set too. Autograd adds up what one probe gets from several matrices.
    """

    each: Float[Tensor, "n *m o k"] | None = None
    probe: Float[Tensor, "n"] | Float[Tensor, "n s"] | None = None
    key: Int[Tensor, ""] | None = None  # of the matrix's sketch
    weight: Float[Tensor, "*m o k"] | None = None  # multiplied with a gradient before its sketch


def number_of_groups(sink: Sink) -> int:
    """The number of groups n that a sink is for."""
    leaf = sink.each if sink.probe is None else sink.probe
    assert leaf is not None
    return leaf.shape[0]


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def group_gradients_reference(
    dy: Float[Tensor, "m o"], x: Float[Tensor, "m k"], group: Int[Tensor, "m"], n: int
) -> Float[Tensor, "n o k"]:
    """The gradients of the matrix of y = x M', for the gradient dy of y and each row's group."""
    return torch.stack([dy[group == g].t() @ x[group == g] for g in range(n)])


# ── 2. derivative ─────────────────────────────────────────────────────────────────────────
class _GroupGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        """y.

        Args:
            ctx: autograd's context.
            inputs: y [m, o]; x [m, k]; scaling; offsets and order of the groups; the number of
                matrices of each sink, for experts, or None; the number of rows of each sink's
                matrix; the probe or None; then the leaves `each` of all sinks, or their keys and
                weights (None without).
        """
        y, x, scaling, offsets, order, experts, sizes, probe, *rest = inputs
        ctx.static = scaling, experts, sizes
        ctx.save_for_backward(x, offsets, order, probe, *rest)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, offsets, order, probe, *rest = ctx.saved_tensors
        scaling, experts, sizes = ctx.static
        n = rest[0].shape[0] if probe is None else probe.shape[0]
        groups = n if experts is None else n * experts
        total = torch.ops.fastlora.stacked_outer(dy, x, groups, offsets, order)
        if experts is not None:
            total = total.view(experts, n, *total.shape[1:]).transpose(0, 1)
        if probe is None:
            pieces = zip(total.split(sizes, -2), rest, strict=True)
            each = [_scaled(piece, scaling, leaf.dtype) for piece, leaf in pieces]
            return dy, *[None] * 7, *each
        wide = _scaled(total, scaling, probe.dtype)
        if probe.dim() == 1:
            gathered = wide.square().flatten(1).sum(1)
        else:
            gathered = _sketches(wide, sizes, rest, probe.shape[1])
        return dy, *[None] * 6, gathered, *[None] * len(rest)


def _scaled(gradient, scaling, dtype):
    gradient = gradient.to(dtype)
    return gradient.contiguous() if scaling == 1.0 else gradient * scaling


def _sketches(gradients, sizes, keys_and_weights, k):
    """The sum of the sketches of all sinks' matrices."""
    total = gradients.new_zeros(gradients.shape[0], k)
    for i, piece in enumerate(gradients.split(sizes, -2)):
        key, weight = keys_and_weights[2 * i : 2 * i + 2]
        if weight is not None:
            piece = piece * weight.to(piece.dtype)
        total = total + count_sketch(piece.flatten(1), key, k)
    return total


# ── 3. public functions ────────────────────────────────────────────────────────────────────
def with_group_gradients(
    y: Float[Tensor, "*b o"],
    x: Float[Tensor, "*b k"],
    sinks: list[Sink],
    sizes: list[int],
    groups: Groups,
    scaling: float = 1.0,
    experts: int | None = None,
) -> Float[Tensor, "*b o"]:
    """y, unchanged. Its backward pass also computes the gradients of the sinks' tensors.

    Args:
        y: scaling * x M' plus anything that does not depend on M, where the sinks' matrices are the
            rows of M.
        x: input of the product. The derivative does not reach it through this function.
        sinks: one for each matrix, all with the same fields set.
        sizes: number of rows of each matrix.
        groups: of the rows of y and x.
        scaling: of the product.
        experts: each sink is for this many matrices, and the groups are all pairs (matrix, group),
            sorted by matrix; None: for one matrix.
    """
    probe = sinks[0].probe
    if probe is None:
        rest = [sink.each for sink in sinks]
    elif probe.dim() == 1:
        rest = []
    else:
        rest = [x for sink in sinks for x in (sink.key, sink.weight)]
    flat_y, flat_x = y.reshape(-1, y.shape[-1]), x.detach().reshape(-1, x.shape[-1])
    sized = tuple(sizes)
    out = _GroupGradients.apply(flat_y, flat_x, scaling, *groups, experts, sized, probe, *rest)
    return out.view(y.shape)  # pyright: ignore[reportAttributeAccessIssue]


def expert_linear(
    x: Float[Tensor, "m d_in"],
    weight: Float[Tensor, "e d_out d_in"],
    a: Float[Tensor, "e r d_in"],
    b: Float[Tensor, "e d_out r"],
    offsets: Int[Tensor, "e"],
    scaling: float,
    sinks: tuple[Sink, Sink],
    pair_ends: Int[Tensor, "en"],
) -> Float[Tensor, "m d_out"]:
    """`experts.grouped_lora_linear` with sinks for A and B.

    Args:
        x: rows, sorted by expert, and those of one expert by group.
        weight: frozen base matrices.
        a: LoRA's A of each expert, which requires no gradient.
        b: LoRA's B of each expert, which requires no gradient.
        offsets: the end of each expert's rows, int32.
        scaling: factor of the low-rank term (alpha / r).
        sinks: of A and of B.
        pair_ends: the end of each pair (expert, group), int32.
    """
    (e, r, _), pairs = a.shape, Groups(pair_ends)
    wide = F.pad(a, (0, 0, 0, -r % 8)) if x.is_cuda else a  # as in `grouped_lora_linear`
    x_a = grouped_linear(x, wide, offsets)[:, :r]
    x_a = with_group_gradients(x_a, x, [sinks[0]], [r], pairs, experts=e)
    y = grouped_lora_product(x, x_a, weight, b, offsets, scaling)
    sizes = [weight.shape[1]]
    return with_group_gradients(y, x_a, [sinks[1]], sizes, pairs, scaling, experts=e)
