"""Gradients of the low-rank terms y_i = s_i xA_i B_i' of several layers: dxA_i = s_i dy_i B_i and
dB_i = s_i dy_i' xA_i (Hu et al. 2021, arXiv:2106.09685).

The reference is the specification. The op runs low_rank_gradients_kernel.py, which reads each dy_i
once and takes two launches for all layers. As products each layer takes two, each of which reads
dy_i and splits its sums, so that it takes another launch to clear and one to add them.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.launch import implement

# The kernel is measured at rank 16, one tile. At most three layers share an input: q, k and v.
_LARGEST_RANK, _MOST_LAYERS = 16, 3


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def low_rank_gradients_reference(
    dy: Float[Tensor, "n _"],
    bs: Sequence[Float[Tensor, "_ _"]],
    x_a: Float[Tensor, "n _"],
    starts: Sequence[int],
    scalings: Sequence[float],
) -> tuple[Float[Tensor, "n r"], list[Float[Tensor, "_ _"]]]:
    """(all dxA_i side by side, every dB_i), differentiable any number of times."""
    ranks = [b.shape[1] for b in bs]
    columns = x_a[:, : sum(ranks)].split(ranks, 1)
    dys = [dy[:, start : start + b.shape[0]] for b, start in zip(bs, starts, strict=True)]
    dx_a = [s * torch.mm(y, b) for y, b, s in zip(dys, bs, scalings, strict=True)]
    dbs = [s * torch.mm(y.t(), x) for y, x, s in zip(dys, columns, scalings, strict=True)]
    return torch.cat(dx_a, 1), dbs


# ── 2. op ─────────────────────────────────────────────────────────────────────────────────
# All dB_i are one tensor, because an op's schema cannot say how many tensors it returns.
torch.library.define(
    "fastlora::low_rank_gradients",
    "(Tensor dy, Tensor[] bs, Tensor x_a, int[] starts, float[] scalings) -> (Tensor, Tensor)",
)


@implement("fastlora::low_rank_gradients")
def _low_rank_gradients(*args):
    from fastlora.ops.linear import low_rank_gradients_kernel  # noqa: PLC0415  imports triton

    return low_rank_gradients_kernel.low_rank_gradients_fused(*args)


@torch.library.register_fake("fastlora::low_rank_gradients")
def _(dy, bs, x_a, starts, scalings):
    dx_a = dy.new_empty(dy.shape[0], sum(b.shape[1] for b in bs))
    return dx_a, dy.new_empty(sum(b.numel() for b in bs))


def scaled_product(
    x: Float[Tensor, "n k"], y: Float[Tensor, "k m"], scaling: float
) -> Float[Tensor, "n m"]:
    """scaling * x y in one launch, scaled before the product is rounded."""
    return torch.addmm(y[:1], x, y, beta=0, alpha=scaling)  # with beta = 0 torch ignores y[:1]


# ── 3. public functions ───────────────────────────────────────────────────────────────────
def kernel_supports(dtype: torch.dtype, *ranks: int) -> bool:
    """Whether the kernel is tested and measured to be faster for this dtype and these ranks."""
    known = dtype in (torch.bfloat16, torch.float16)
    return known and 0 < len(ranks) <= _MOST_LAYERS and max(ranks) <= _LARGEST_RANK


def low_rank_gradients(
    dy: Float[Tensor, "n _"],
    bs: Sequence[Float[Tensor, "_ _"]],
    x_a: Float[Tensor, "n _"],
    starts: Sequence[int],
    scalings: Sequence[float],
) -> tuple[Float[Tensor, "n r"], list[Float[Tensor, "_ _"]]]:
    """(all dxA_i side by side, every dB_i) in dy.dtype. Runs a Triton kernel; not differentiable.

    Args:
        dy: the gradients of the layers' outputs, as columns of one tensor.
        bs: every B_i.
        x_a: all xA_i side by side; further columns are not read.
        starts: the first column of each dy_i, which has as many columns as B_i has rows.
        scalings: every s_i.
    """
    dx_a, db = torch.ops.fastlora.low_rank_gradients(dy, [*bs], x_a, [*starts], [*scalings])
    parts = db.split([b.numel() for b in bs])
    return dx_a, [part.view(b.shape) for part, b in zip(parts, bs, strict=True)]


def layer_gradients(
    dys: Sequence[Float[Tensor, "n _"] | None],
    side_by_side: Float[Tensor, "n _"] | None,
    widths: Sequence[int],
    bs: Sequence[Float[Tensor, "_ _"] | None],
    x_a: Float[Tensor, "n _"] | None,
    scalings: Sequence[float | None],
    *,
    fused: bool,
) -> tuple[Float[Tensor, "n r"] | None, Sequence[Float[Tensor, "_ _"] | None]]:
    """(all dxA_i side by side, every dB_i or None), by the kernel if it may run and supports them.

    (None, []) if no layer has a low-rank term.

    Args:
        dys: the gradient of each layer's output. A layer in which it is None has zeros in dxA, and
            None in place of dB.
        side_by_side: these gradients as consecutive columns of one tensor, or None.
        widths: the columns of each.
        bs: each layer's B; None without a low-rank term, for which the result has no entry.
        x_a: the xA_i of the layers with B, side by side; further columns are not read.
        scalings: each layer's s.
        fused: whether Triton kernels may run.
    """
    ends = accumulate(widths)
    each = zip(
        dys, [end - w for end, w in zip(ends, widths, strict=True)], bs, scalings, strict=True
    )
    chosen = [(dy, start, b, s) for dy, start, b, s in each if b is not None and s is not None]
    if not chosen or x_a is None:
        return None, []
    dys, starts, bs, scalings = zip(*chosen, strict=True)
    given = [y for y in dys if y is not None]
    fused = fused and len(given) == len(bs) and not torch.is_grad_enabled()
    if fused and kernel_supports(given[0].dtype, *(b.shape[1] for b in bs)):
        if len(bs) == 1:
            return low_rank_gradients(given[0], bs, x_a, [0], scalings)
        if side_by_side is not None:
            return low_rank_gradients(side_by_side, bs, x_a, starts, scalings)
    ranks = [b.shape[1] for b in bs]
    columns, dx_as, dbs = x_a[:, : sum(ranks)].split(ranks, 1), [], []
    for dy, b, x, scaling in zip(dys, bs, columns, scalings, strict=True):
        dx_as.append(torch.zeros_like(x) if dy is None else scaled_product(dy, b, scaling))
        dbs.append(None if dy is None else scaled_product(dy.t(), x, scaling))
    return torch.cat(dx_as, 1) if len(dx_as) > 1 else dx_as[0], dbs
