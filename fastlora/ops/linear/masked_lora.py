"""The low-rank halves of several layers of one input, each under a mask of its own:
low_i = dropout(x, p, key_i) A_i' (Hu et al. 2021, arXiv:2106.09685; the masks are dropout.py's).

Read downward: the reference is the specification, and writes a masked copy of x for each; the ops
run masked_x_a_kernel.py, which writes none. Their derivative is lora_linears', whose other
products have formed the gradient of x that the backward op adds to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import rank_tile
from fastlora.ops.dropout import dropout


class Masks(NamedTuple):
    """How each of several A sees their one x."""

    keys: Int[Tensor, "k"]  # on x's device
    slots: tuple[int, ...]  # of each A the place of its mask's key; -1: it sees all of x
    p: float  # share of x that a mask hides
    fused: bool  # whether Triton kernels may run


class Segments(NamedTuple):
    """What the ops know of Masks beside the keys, and of each A its rows."""

    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    p: float


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def masked_x_a_reference(
    x: Float[Tensor, "*n d"], matrices: Sequence[Float[Tensor, "_ d"]], masks: Masks
) -> Float[Tensor, "*n r"]:
    """Every low_i side by side, differentiable any number of times."""
    pairs = zip(matrices, _each(masks.keys, masks.slots), strict=True)
    return torch.cat([F.linear(dropout(x, masks.p, key), a) for a, key in pairs], -1)


def _each(keys: Int[Tensor, "k"], slots: tuple[int, ...]) -> list[Int[Tensor, ""] | None]:
    return [None if slot < 0 else keys[slot] for slot in slots]


def masked_x_a_gradients_reference(
    dlow: Float[Tensor, "n r"],
    x: Float[Tensor, "n d"],
    a: Float[Tensor, "r d"],
    keys: Int[Tensor, "k"],
    segments: Segments,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "r d"]]:
    """The gradients of x and of every A, one above the other; themselves differentiable."""
    ranks, slots, p = segments
    each = [*zip(dlow.split(ranks, 1), a.split(ranks), _each(keys, slots), strict=True)]
    dx = [dropout(torch.mm(d, matrix), p, key) for d, matrix, key in each]
    da = [torch.mm(d.t(), dropout(x, p, key)) for d, _, key in each]
    return torch.stack(dx).sum(0), torch.cat(da)


# ── 2. ops ────────────────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::masked_x_a",
    "(Tensor x, Tensor a, Tensor keys, int[] ranks, int[] slots, float p) -> Tensor",
)


# Of dA, and of dA (or no rows) with x's gradient added to dx: two, because Inductor fails over an
# op that may mutate a tensor where it is given none (torch 2.13).
torch.library.define(
    "fastlora::masked_x_a_backward",
    "(Tensor x, Tensor dlow, Tensor a, Tensor keys, int[] ranks, int[] slots, float p) -> Tensor",
)

torch.library.define(
    "fastlora::masked_x_a_backward_",
    "(Tensor(a!) dx, Tensor x, Tensor dlow, Tensor a, Tensor keys, int[] ranks, int[] slots,"
    " float p, bool needs_a) -> Tensor",
)


@torch.library.impl("fastlora::masked_x_a", "CompositeExplicitAutograd")
def _masked_x_a(*args):
    from fastlora.ops.linear.masked_lora_kernel import masked_x_a_fused  # noqa: PLC0415  imports triton

    return masked_x_a_fused(*args)


@torch.library.impl("fastlora::masked_x_a_backward", "CompositeExplicitAutograd")
def _masked_x_a_backward(x, dlow, a, keys, ranks, slots, p):
    from fastlora.ops.linear.masked_lora_kernel import masked_x_a_backward_  # noqa: PLC0415  likewise

    return masked_x_a_backward_(None, x, dlow, a, keys, ranks, slots, p, True)


@torch.library.impl("fastlora::masked_x_a_backward_", "CompositeExplicitAutograd")
def _masked_x_a_backward_(*args):
    from fastlora.ops.linear.masked_lora_kernel import masked_x_a_backward_  # noqa: PLC0415  likewise

    return masked_x_a_backward_(*args)


@torch.library.register_fake("fastlora::masked_x_a")
def _(x, a, keys, ranks, slots, p):
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("fastlora::masked_x_a_backward")
def _(x, dlow, a, keys, ranks, slots, p):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastlora::masked_x_a_backward_")
def _(dx, x, dlow, a, keys, ranks, slots, p, needs_a):
    return a.new_empty(a.shape[0] if needs_a else 0, a.shape[1])


def add_gradients(
    dx: Float[Tensor, "n d"] | None,
    dlow: Float[Tensor, "n r"],
    x: Float[Tensor, "n d"],
    a: Float[Tensor, "r d"],
    keys: Int[Tensor, "k"],
    segments: Segments,
    needs_x: bool,
    needs_a: bool,
) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, "r d"] | None]:
    """(dx plus what comes through dlow, dA), None for what is not needed. dx, where there is one,
    is contiguous and overwritten."""
    if torch.is_grad_enabled():  # create_graph=True, but the kernel is not differentiable
        more, da = masked_x_a_gradients_reference(dlow, x, a, keys, segments)
        return more if dx is None else dx + more, da
    ops = torch.ops.fastlora
    if not needs_x:
        return None, ops.masked_x_a_backward(x, dlow, a, keys, *segments) if needs_a else None
    if dx is None:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    da = ops.masked_x_a_backward_(dx, x, dlow, a, keys, *segments, needs_a)
    return dx, da if needs_a else None


# ── 3. what the model's linear layers ask ─────────────────────────────────────────────────

# Columns of all tiles, each a power of two, that the backward kernel's sums hold in registers
# without spilling them (sm_90, Triton 3.9; in float32 a few are).
_COLUMNS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}


def takes(dtype: torch.dtype, *ranks: int) -> bool:
    """Whether the kernels are fit for tensors of this dtype and as many A of these ranks."""
    return rank_tile(*ranks) * len(ranks) <= _COLUMNS.get(dtype, 0)
