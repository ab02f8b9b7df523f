"""The queries, keys and values of one input, with LoRA and RoPE, for attention: one base product,
and one kernel that adds the low-rank terms and rotates (Hu et al. 2021, arXiv:2106.09685; Su et
al. 2021, arXiv:2104.09864).

The specification is `lora_linears` of ops/linear/lora_group.py, then `apply_rope` of rope.py for q
and k. As separate operations, the low-rank terms are written and read again by the base products,
and RoPE reads and writes q and k once more: 84 MB more per layer of 1B at 4 x 2048 tokens.

Attention's backward pass applies RoPE's gradient itself, so the gradient that arrives here is that
of q, k and v before the rotation, side by side.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import needs_reference, rank_tile
from fastlora.ops.linear.input_gradient import input_gradient
from fastlora.ops.linear.lora_group import Branch
from fastlora.ops.linear.low_rank_gradients import layer_gradients
from fastlora.ops.linear.masked_lora import Masks, Segments, add_gradients
from fastlora.ops.linear.masked_lora import kernel_supports as masks_supported
from fastlora.ops.linear.times_a import times_a

_LARGEST_RANK = 64  # larger tiles of B are not measured
_SMALLEST_HEAD = 32  # tl.dot needs 16 columns, and a product has those of half a head


def kernel_supports(
    dtype: torch.dtype,
    head_dim: int,
    branches: Sequence[Branch],
    ranks: Sequence[int],
    masks: Masks | None,
) -> bool:
    """Whether `rotated_qkv` computes these layers.

    Args:
        dtype: of the input.
        head_dim: head size, for which a kernel of attention exists.
        branches: q, k and v.
        ranks: of every A.
        masks: of the As.
    """
    bs = [branch.b for branch in branches if branch.b is not None]
    if not bs or any(branch.bias is not None for branch in branches):
        return False
    if needs_reference(*(branch.weight for branch in branches)):  # pyright: ignore
        return False
    if masks is not None and not (masks.fused and masks_supported(dtype, *ranks)):
        return False
    wide = rank_tile(*(b.shape[1] for b in bs)) <= _LARGEST_RANK
    return wide and head_dim >= _SMALLEST_HEAD and head_dim & (head_dim - 1) == 0


# ── op and derivative ─────────────────────────────────────────────────────────────────────
# The base product is inside the op, so that a recompute policy keeps q, k and v and not it too.
torch.library.define(
    "fastlora::rotated_qkv",
    "(Tensor x, Tensor weight, Tensor x_a, Tensor?[] bs, Tensor cos, Tensor sin, int[] heads,"
    " float[] scalings) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastlora::rotated_qkv", "CompositeExplicitAutograd")
def _rotated_qkv(*args):
    from fastlora.ops.attention.rotated_qkv_kernel import rotated_qkv  # noqa: PLC0415  triton

    return rotated_qkv(*args)


@torch.library.register_fake("fastlora::rotated_qkv")
def _(x, weight, x_a, bs, cos, sin, heads, scalings):
    q, kv = (size * cos.shape[2] for size in heads)
    return x.new_empty(x.shape[0], q), x.new_empty(x.shape[0], kv), x.new_empty(x.shape[0], kv)


class _RotatedQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # a variable argument list: see _LoRALinear
        """(q, k, v, placeholder); the placeholder takes the gradients of all three.

        Args:
            ctx: autograd's context.
            inputs: x [n, d]; all A as one matrix; the masks' keys and segments, or None; the weight
                of q, k and v; cos and sin; the numbers of heads of q and k; the three scalings;
                `fused`; which of the three have a B; then these Bs.
        """
        x, a, keys, segments, weight, cos, sin, heads, scalings, fused, has_b, *bs = inputs
        if keys is None:
            x_a = times_a(x, a)
        else:
            x_a = torch.ops.fastlora.masked_x_a(x, a, keys, *segments)
        each = _in_places(bs, has_b)
        op = torch.ops.fastlora.rotated_qkv
        q, k, v = op(x, weight, x_a, each, cos, sin, list(heads), list(scalings))
        ctx.static = segments, heads, scalings, fused, has_b, cos.shape[2]
        ctx.save_for_backward(x, a, keys, weight, x_a, *bs)
        ctx.mark_non_differentiable(q, k, v)
        return q, k, v, x.new_empty(()).expand(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a, keys, weight, x_a, *bs = ctx.saved_tensors
        segments, (h, kv), scalings, fused, has_b, hd = ctx.static
        needs_x, needs_a = ctx.needs_input_grad[:2]
        dy = gradients[3]
        widths = [h * hd, kv * hd, kv * hd]
        each = _in_places(bs, has_b)
        of_b = [s if present else None for s, present in zip(scalings, has_b, strict=True)]
        low_rank = [*dy.split(widths, 1)], dy, widths, each, x_a, of_b
        dx_a, dbs = layer_gradients(*low_rank, fused=fused)
        assert dx_a is not None, "one of the three has a B"
        dx_a_term = dx_a if keys is None else None  # with masks, add_gradients adds it below
        dx = input_gradient(dx_a_term, a, [dy], [[weight]]) if needs_x else None
        if keys is None:
            da = torch.mm(dx_a.t(), x) if needs_a else None
        else:
            dx, da = add_gradients(dx, dx_a, x, a, keys, segments, needs_x, needs_a)
        return dx, da, *[None] * 9, *dbs


def _in_places(bs, has_b):
    rest = list(bs)
    return [rest.pop(0) if present else None for present in has_b]


# ── public function ───────────────────────────────────────────────────────────────────────
def rotated_qkv(
    x: Float[Tensor, "b t d"],
    matrices: Sequence[Float[Tensor, "_ d"]],
    branches: Sequence[Branch],
    masks: Masks | None,
    weight: Float[Tensor, "d_out d"],
    rope: tuple[Float[Tensor, "#b t hd"], Float[Tensor, "#b t hd"]],
    heads: tuple[int, int],
    *,
    fused: bool = False,
) -> tuple[
    Float[Tensor, "b h t hd"],
    Float[Tensor, "b kv t hd"],
    Float[Tensor, "b kv t hd"],
    Float[Tensor, "b t d_out"],
]:
    """(q, k, v, placeholder) in x.dtype; q and k are rotated. Runs a Triton kernel.

    q, k and v are transposed views of [b, t, heads, hd] and have no gradient. `flash_attention`
    returns the gradients of the unrotated ones, side by side, as the placeholder's.

    Args:
        x: the input.
        matrices: every A, in the branches' order.
        branches: q, k and v, of which `kernel_supports` has been asked; their weights are not read.
        masks: of the As; None: no dropout.
        weight: those of q, k and v as one matrix.
        rope: cos and sin of each position's angles, in x.dtype.
        heads: the numbers of heads of q and of k.
        fused: whether the other Triton kernels may run.
    """
    keys, segments = None, None
    if masks is not None:
        keys = masks.keys
        segments = Segments(tuple(a.shape[0] for a in matrices), masks.slots, masks.p)
    a = matrices[0] if len(matrices) == 1 else torch.cat([*matrices])
    q, k, v, placeholder = _RotatedQKV.apply(  # pyright: ignore
        x.reshape(-1, x.shape[-1]),
        a,
        keys,
        segments,
        weight,
        *rope,
        heads,
        tuple(branch.scaling for branch in branches),
        fused,
        tuple(branch.b is not None for branch in branches),
        *(branch.b for branch in branches if branch.b is not None),
    )
    b, t, _ = x.shape
    split = lambda y, n: y.view(b, t, n, -1).transpose(1, 2)
    (h, kv), joint = heads, placeholder.view(b, t, -1)
    return split(q, h), split(k, kv), split(v, kv), joint
