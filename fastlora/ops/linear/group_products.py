"""Products of rows with one matrix of n per group of rows: y[i] = x[i] W[g]', where g is the group
of row i; and the gradients of the matrices, the sums of y[i]' x[i] over the rows of each group.

Groups of equal size run as one batched product, others as the grouped products of experts.py, and
rows may be in any order. The reference is the specification.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from fastlora.ops.linear.experts import grouped_linear_reference


class Groups(NamedTuple):
    """Which rows belong to which adapter of a stack."""

    # The end of each group of sorted rows: the index of the row after its last. None: all groups
    # have the same number of rows.
    offsets: Int32[Tensor, "n"] | None = None
    order: Int[Tensor, "m"] | None = None  # sorted row -> row; None: rows are sorted by group


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def product_reference(
    x: Float[Tensor, "m k"], w: Float[Tensor, "n o k"], groups: Groups
) -> Float[Tensor, "m o"]:
    """Each row times the matrix of its group, differentiable any number of times."""
    offsets, order = groups
    if offsets is None:
        blocks = torch.bmm(_blocks(x if order is None else x[order], w.shape[0]), w.mT)
        y = blocks.flatten(0, 1)
    else:
        y = grouped_linear_reference(x if order is None else x[order], w, offsets)
    return y if order is None else y[_inverse(order)]


def group_of_rows(groups: Groups, n: int, m: int, device: torch.device) -> Int[Tensor, "m"]:
    """The group of each of m rows, of n groups."""
    offsets, order = groups
    index = torch.arange(m, device=device)
    group = index // (m // n) if offsets is None else (index[:, None] >= offsets).sum(1)
    return group if order is None else torch.zeros_like(order).scatter(0, order, group)


def _blocks(x: Tensor, n: int) -> Tensor:
    """Sorted rows as n equal blocks."""
    return x.reshape(n, x.shape[0] // n, x.shape[1])


def _inverse(order: Tensor) -> Tensor:
    index = torch.arange(order.shape[0], device=order.device)
    return torch.zeros_like(order).scatter(0, order, index)


# ── 2. ops ────────────────────────────────────────────────────────────────────────────────
# The ops take flat rows and compute the blocks themselves, so a compiled graph contains no shape
# that depends on whether n divides the number of rows, and one graph serves every n.
torch.library.define(
    "fastlora::stacked_product", "(Tensor x, Tensor w, Tensor? offsets, Tensor? order) -> Tensor"
)

torch.library.define(
    "fastlora::stacked_outer",
    "(Tensor y, Tensor x, SymInt n, Tensor? offsets, Tensor? order) -> Tensor",
)


def each_group(x, w, offsets, order):
    x = x if order is None else x[order]
    if offsets is None:
        y = torch.bmm(_blocks(x, w.shape[0]), w.mT).view(x.shape[0], -1)
    else:
        y = _grouped_rows(x, w, offsets)
    return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


@torch.library.impl("fastlora::stacked_product", "CompositeExplicitAutograd")
def _(x, w, offsets, order):
    return each_group(x, w, offsets, order)


@torch.library.impl("fastlora::stacked_outer", "CompositeExplicitAutograd")
def _stacked_outer(y, x, n, offsets, order):
    """For each group the sum of y[i]' x[i] over its rows; zeros for an empty group."""
    if order is not None:
        y, x = y[order], x[order]
    if offsets is None:
        return torch.bmm(_blocks(y, n).mT, _blocks(x, n))
    return torch.ops.fastlora.grouped_outer(y, x, offsets)


@torch.library.register_fake("fastlora::stacked_product")
def _(x, w, offsets, order):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.register_fake("fastlora::stacked_outer")
def _(y, x, n, offsets, order):
    return x.new_empty(n, y.shape[1], x.shape[1])


def _grouped_rows(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    # torch's grouped kernel needs strides of 16 bytes, 8 elements. Zeros change no value.
    if x.is_cuda and (short := -x.shape[1] % 8):
        x, w = F.pad(x, (0, short)), F.pad(w, (0, short))
    rows = w.shape[1]
    if x.is_cuda and (short := -rows % 8):
        w = F.pad(w, (0, 0, 0, short))
    y = torch.ops.fastlora.grouped_linear(x, w, offsets, None, None, 0.0)
    return y if y.shape[1] == rows else y[:, :rows].contiguous()


# ── 3. derivative ─────────────────────────────────────────────────────────────────────────
class _GroupProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, offsets, order):
        ctx.save_for_backward(x, a, offsets, order)
        return torch.ops.fastlora.stacked_product(x, a, offsets, order)

    @staticmethod
    def backward(ctx, dx_a):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, *rest = ctx.saved_tensors
        groups = Groups(*rest)
        dx = product(dx_a, a.mT, groups) if ctx.needs_input_grad[0] else None
        return dx, outer(dx_a, x, a, groups), None, None


# The raw ops have no derivative. With create_graph=True the backward pass uses the reference.
def product(x, w, groups):
    if torch.is_grad_enabled():
        return product_reference(x, w, groups)
    return torch.ops.fastlora.stacked_product(x, w, *groups)


def outer(y, x, like, groups):
    """The gradient of a group's matrix y' x, for every group."""
    n = like.shape[0]
    if not torch.is_grad_enabled():
        return torch.ops.fastlora.stacked_outer(y, x, n, *groups)
    offsets, order = groups
    if order is not None:
        y, x = y[order], x[order]
    if offsets is None:
        return torch.bmm(_blocks(y, n).mT, _blocks(x, n))
    group = (torch.arange(x.shape[0], device=x.device)[:, None] >= offsets).sum(1)
    inside = (group == torch.arange(n, device=x.device)[:, None]).to(x.dtype)
    return torch.einsum("nm,mo,mk->nok", inside, y, x)


# ── 4. public function ────────────────────────────────────────────────────────────────────
def group_product(
    x: Float[Tensor, "*m k"], w: Float[Tensor, "n o k"], groups: Groups
) -> Float[Tensor, "m o"]:
    """Each row of x, flattened, times the matrix of its group, in x.dtype, with a derivative."""
    return _GroupProduct.apply(x.reshape(-1, x.shape[-1]), w, *groups)  # pyright: ignore
