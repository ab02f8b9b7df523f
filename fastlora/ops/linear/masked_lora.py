"""LoRA's A with dropout, for several layers of one input: xA_i = dropout(x, p, key_i) A_i'
(Hu et al. 2021, arXiv:2106.09685; dropout.py draws the masks).

The reference is the specification; it writes a masked copy of x for each layer. The ops run
masked_lora_kernel.py, which writes none. lora_group.py contains their derivative: its other
products have computed a part of x's gradient already, and the backward op adds to it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import rank_tile
from fastlora.ops.dropout import dropout, key_and_row
from fastlora.ops.launch import implement


class Masks(NamedTuple):
    """The dropout masks of several A that share one input."""

    # On x's device; results of dropout.from_row. With keys for pieces of x, each mask has several.
    keys: Int[Tensor, "k *pieces"]
    slots: tuple[int, ...]  # for each A, the index of its mask's key; -1: no mask
    p: float  # share of x that is dropped
    fused: bool  # whether Triton kernels may run


class Segments(NamedTuple):
    """The static arguments of the ops: the fields of Masks without keys, and the rank of each A."""

    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    p: float


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def masked_x_a_reference(
    x: Float[Tensor, "*n d"], matrices: Sequence[Float[Tensor, "_ d"]], masks: Masks
) -> Float[Tensor, "*n r"]:
    """All xA_i side by side, differentiable any number of times."""
    pairs = zip(matrices, _key_of_each(masks.keys, masks.slots), strict=True)
    return torch.cat([F.linear(_masked(x, masks.p, key), a) for a, key in pairs], -1)


def _masked(x: Float[Tensor, "*n d"], p: float, key: Int[Tensor, "*pieces"] | None):
    return x if key is None else dropout(x, p, *key_and_row(key))


def _key_of_each(
    keys: Int[Tensor, "k *pieces"], slots: tuple[int, ...]
) -> list[Int[Tensor, "*pieces"] | None]:
    return [None if slot < 0 else keys[slot] for slot in slots]


def masked_x_a_gradients_reference(
    dx_a: Float[Tensor, "n r"],
    x: Float[Tensor, "n d"],
    a: Float[Tensor, "r d"],
    keys: Int[Tensor, "k"],
    segments: Segments,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "r d"]]:
    """(gradient of x, gradients of all A stacked by rows). Both are differentiable."""
    ranks, slots, p = segments
    each = [*zip(dx_a.split(ranks, 1), a.split(ranks), _key_of_each(keys, slots), strict=True)]
    dx = [_masked(torch.mm(d, matrix), p, key) for d, matrix, key in each]
    da = [torch.mm(d.t(), _masked(x, p, key)) for d, _, key in each]
    return torch.stack(dx).sum(0), torch.cat(da)


# ── 2. ops ────────────────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::masked_x_a",
    "(Tensor x, Tensor a, Tensor keys, int[] ranks, int[] slots, float p) -> Tensor",
)


# There are two backward ops. The first returns dA. The second returns dA (no rows if it is not
# needed) and adds x's gradient to dx. One op with an optional dx would do, but Inductor fails on an
# op whose mutated argument is None (torch 2.13).
torch.library.define(
    "fastlora::masked_x_a_backward",
    "(Tensor x, Tensor dx_a, Tensor a, Tensor keys, int[] ranks, int[] slots, float p) -> Tensor",
)

torch.library.define(
    "fastlora::masked_x_a_backward_",
    "(Tensor(a!) dx, Tensor x, Tensor dx_a, Tensor a, Tensor keys, int[] ranks, int[] slots,"
    " float p, bool needs_a) -> Tensor",
)


@implement("fastlora::masked_x_a")
def _masked_x_a(*args):
    from fastlora.ops.linear import masked_lora_kernel  # noqa: PLC0415  imports triton

    return masked_lora_kernel.masked_x_a_fused(*args)


@implement("fastlora::masked_x_a_backward")
def _masked_x_a_backward(x, dx_a, a, keys, ranks, slots, p):
    from fastlora.ops.linear import masked_lora_kernel  # noqa: PLC0415  imports triton

    return masked_lora_kernel.masked_x_a_backward_(None, x, dx_a, a, keys, ranks, slots, p, True)


@implement("fastlora::masked_x_a_backward_")
def _masked_x_a_backward_(*args):
    from fastlora.ops.linear import masked_lora_kernel  # noqa: PLC0415  imports triton

    return masked_lora_kernel.masked_x_a_backward_(*args)


@torch.library.register_fake("fastlora::masked_x_a")
def _(x, a, keys, ranks, slots, p):
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("fastlora::masked_x_a_backward")
def _(x, dx_a, a, keys, ranks, slots, p):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastlora::masked_x_a_backward_")
def _(dx, x, dx_a, a, keys, ranks, slots, p, needs_a):
    return a.new_empty(a.shape[0] if needs_a else 0, a.shape[1])


def add_gradients(
    dx: Float[Tensor, "n d"] | None,
    dx_a: Float[Tensor, "n r"],
    x: Float[Tensor, "n d"],
    a: Float[Tensor, "r d"],
    keys: Int[Tensor, "k"],
    segments: Segments,
    needs_x: bool,
    needs_a: bool,
) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, "r d"] | None]:
    """(dx plus the gradient of x through x_a, dA); None for a gradient that is not needed.

    dx must be contiguous, or None for zeros; it is overwritten.
    """
    if torch.is_grad_enabled():  # create_graph=True, but the kernel is not differentiable
        more, da = masked_x_a_gradients_reference(dx_a, x, a, keys, segments)
        return more if dx is None else dx + more, da
    ops = torch.ops.fastlora
    if not needs_x:
        return None, ops.masked_x_a_backward(x, dx_a, a, keys, *segments) if needs_a else None
    if dx is None:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    da = ops.masked_x_a_backward_(dx, x, dx_a, a, keys, *segments, needs_a)
    return dx, da if needs_a else None


# ── 3. when the kernels run ───────────────────────────────────────────────────────────────

# The backward kernel holds one tile of sums per A in registers. These are the most columns of all
# tiles together, each a power of two, for which registers do not spill (sm_90, Triton 3.9; in
# float32 a few do).
_COLUMNS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}


def kernel_supports(dtype: torch.dtype, *ranks: int) -> bool:
    """Whether the kernels support this dtype and this many A of these ranks."""
    return rank_tile(*ranks) * len(ranks) <= _COLUMNS.get(dtype, 0)
