"""Attention of a part of a row's queries over all of its keys (context parallel).

Each rank has two pieces of every row. Its queries stay, in the order of the row, and all keys come
to it. So each query sees one span of keys that ends at its own position in the row, and each key is
seen by one span of the rank's queries.

The specification is `attention_reference` of attention.py under `part_mask`. The op runs
flash_kernel.py, for types and sizes of `flash.kernel_supports`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.ops.launch import implement


class PartSpans(NamedTuple):
    """Which keys t queries of a row of s tokens see. All fields are int32 and non-decreasing.

    In a row of 8 tokens, of which this rank has tokens 2, 3, 4 and 5, two documents of 5 and 3:

        first = [0, 0, 0, 5]    until = [2, 3, 4, 5]
        since = [0, 0, 0, 1, 2, 3, 4, 4]    last = [2, 2, 2, 2, 2, 3, 3, 3]
    """

    first: Int[Tensor, "b t"]  # the first key that each query sees
    until: Int[Tensor, "b t"]  # the last one: its own position
    since: Int[Tensor, "b s"]  # the first query that sees each key, if it is not after `last`
    last: Int[Tensor, "b s"]  # the last one


def make_part_spans(first: Int[Tensor, "b t"], until: Int[Tensor, "b t"], keys: int) -> PartSpans:
    """Spans from the keys of each query, computed on their device without a synchronisation.

    Args:
        first: the first key of each query, in [0, keys).
        until: the last one.
        keys: the length of the row, s.
    """
    index = torch.arange(keys, device=first.device).expand(len(first), keys).contiguous()
    first, until = first.contiguous(), until.contiguous()
    since = torch.searchsorted(until, index, out_int32=True)
    last = torch.searchsorted(first, index, right=True, out_int32=True) - 1
    return PartSpans(first.to(torch.int32), until.to(torch.int32), since, last)


def part_mask(
    first: Int[Tensor, "b t"], until: Int[Tensor, "b t"], keys: int
) -> Bool[Tensor, "b 1 t s"]:
    """The mask of `make_part_spans`: True where a query sees a key."""
    index = torch.arange(keys, device=first.device)
    return ((index >= first[..., None]) & (index <= until[..., None]))[:, None]


# ── op and derivative ─────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::part_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor first, Tensor until, float? scale=None,"
    " float? cap=None) -> (Tensor, Tensor)",
)

torch.library.define(
    "fastlora::part_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor first,"
    " Tensor until, Tensor since, Tensor last, float? scale=None, float? cap=None)"
    " -> (Tensor, Tensor)",
)


@implement("fastlora::part_attention")
def _part_attention(q, k, v, first, until, scale=None, cap=None):
    from fastlora.ops.attention.flash_kernel import flash_forward  # noqa: PLC0415  imports triton

    return flash_forward(q, k, v, first, scale, cap, until)


@implement("fastlora::part_attention_backward")
def _part_attention_backward(*args):
    from fastlora.ops.attention.flash_kernel import part_backward  # noqa: PLC0415  imports triton

    return part_backward(*args)


@torch.library.register_fake("fastlora::part_attention")
def _(q, k, v, first, until, scale=None, cap=None):
    b, h, t, hd = q.shape
    out = q.new_empty(b, t, h, hd).transpose(1, 2)
    return out, q.new_empty(b, h, t, dtype=torch.float32)


@torch.library.register_fake("fastlora::part_attention_backward")
def _(dout, q, k, v, out, lse, first, until, since, last, scale=None, cap=None):
    (b, h, t, hd), (kv, s) = q.shape, k.shape[1:3]
    return q.new_empty(b, t, h * hd), q.new_empty(b, s, 2 * kv * hd)


class _PartAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first, until, since, last, scale, cap):
        ctx.scale_and_cap = scale, cap
        out, lse = torch.ops.fastlora.part_attention(q, k, v, first, until, scale, cap)
        ctx.save_for_backward(q, k, v, out, lse, first, until, since, last)
        return out

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but the kernel is not differentiable
            raise RuntimeError(
                "attention of a part of a row has no second derivative; differentiate"
                " fastlora.functional without context parallel, with torch.func."
            )
        kept = ctx.saved_tensors
        how = ctx.scale_and_cap
        dq, dkv = torch.ops.fastlora.part_attention_backward(dout, *kept, *how)
        (h, kv), hd = (x.shape[1] for x in kept[:2]), kept[0].shape[3]
        dq = dq.unflatten(2, (h, hd)).transpose(1, 2)
        dk, dv = dkv.unflatten(2, (2 * kv, hd)).transpose(1, 2).split([kv, kv], 1)
        return dq, dk, dv, *[None] * 6


def part_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    spans: PartSpans,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b h t hd"]:
    """softmax(q k' / sqrt(hd)) v over each query's span of keys.

    Runs Triton kernels. The result is a transposed view of a [b, t, h, hd] tensor, with the same
    bits in every run.

    Args:
        q: this rank's queries, rotated.
        k: all keys, rotated; each key head serves h / kv query heads.
        v: values, with as many heads as k.
        spans: the keys that each query sees.
        scale: factor of the scores; None: 1 / sqrt(hd).
        cap: scores s become cap * tanh(s / cap); None: they stay.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    return _PartAttention.apply(q, k, v, *spans, scale, cap)  # pyright: ignore[reportReturnType]
