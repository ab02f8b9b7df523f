"""Causal attention where each query sees one span of keys, from some first key up to itself, or all
before it: plain rows, packed documents, sliding windows, each at the cost of the blocks that are
seen (Dao 2023, arXiv:2307.08691).

The specification is attention.py's `attention_reference`, under the mask that the spans stand for,
of rotated queries and keys. The op runs flash_attention_kernel.py; its derivative rotates back what
it has just summed, where Inductor reads and writes all of it again, and gives the same bits every
run, which none of SDPA's fused backward passes on CUDA does.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.attention.rope import apply_rope


class Spans(NamedTuple):
    """What queries see, row by row: neither list ever falls along a row."""

    first: Int[Tensor, "b t"]  # int32: the first key that each query sees; the last is its own
    last: Int[Tensor, "b t"]  # int32: the last query that sees each key


def make_spans(first: Int[Tensor, "b t"]) -> Spans:
    """Both lists from the first of them, made on its device without waiting for it."""
    index = torch.arange(first.shape[1], device=first.device).expand_as(first).contiguous()
    first = first.contiguous()
    last = torch.searchsorted(first, index, right=True, out_int32=True) - 1
    return Spans(first.to(torch.int32), last)


# The longest rows, all of which is seen, for which the kernels took less time than cuDNN's, by
# head_dim (H100; scripts/bench_results/2026-11-27-attention-lengths.txt). A longer one costs up to
# 8 and 28 % more.
_LONGEST = {64: 8192, 128: 2048}


def kernel_supports(dtype: torch.dtype, heads: int, head_dim: int, t: int) -> bool:
    """Whether the kernels were found right for such queries on a CUDA GPU. They count a row's
    elements in 32 bits."""
    known = dtype in (torch.float16, torch.bfloat16) and head_dim in _LONGEST
    return known and t * heads * head_dim < 2**31


def kernel_is_faster(head_dim: int, t: int) -> bool:
    """Whether they are also the fastest there is where a query sees all before it."""
    return t <= _LONGEST[head_dim]


# ── op and derivative ─────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::flash_attention", "(Tensor q, Tensor k, Tensor v, Tensor? first) -> (Tensor, Tensor)"
)

torch.library.define(
    "fastlora::flash_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? first,"
    " Tensor? last, Tensor? cos, Tensor? sin) -> Tensor",
)


@torch.library.impl("fastlora::flash_attention", "CompositeExplicitAutograd")
def _flash_attention(*args):
    from fastlora.ops.attention.flash_kernel import flash_forward  # noqa: PLC0415  imports triton

    return flash_forward(*args)


@torch.library.impl("fastlora::flash_attention_backward", "CompositeExplicitAutograd")
def _flash_attention_backward(*args):
    from fastlora.ops.attention.flash_kernel import flash_backward  # noqa: PLC0415  imports triton

    return flash_backward(*args)


@torch.library.register_fake("fastlora::flash_attention")
def _(q, k, v, first):
    b, h, t, hd = q.shape
    out = q.new_empty(b, t, h, hd).transpose(1, 2)
    return out, q.new_empty(b, h, t, dtype=torch.float32)


@torch.library.register_fake("fastlora::flash_attention_backward")
def _(dout, q, k, v, out, lse, first, last, cos, sin):
    b, h, t, hd = q.shape
    return q.new_empty(b, t, (h + 2 * k.shape[1]) * hd)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, q, k, v, cos, sin, first, last):
        ctx.joint = joint is not None
        if cos is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, lse = torch.ops.fastlora.flash_attention(q, k, v, first)
        ctx.save_for_backward(q, k, v, out, lse, first, last, cos, sin)
        return out

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but what follows is not differentiable
            raise RuntimeError(
                "the fused attention has no second derivative; differentiate fastlora.functional"
                " with torch.func, which runs the plain one."
            )
        kept = ctx.saved_tensors
        grown = torch.ops.fastlora.flash_attention_backward(dout, *kept)
        if ctx.joint:
            return grown, *[None] * 7
        b, t, _ = grown.shape
        heads = [x.shape[1] for x in kept[:3]]
        parts = grown.view(b, t, sum(heads), -1).transpose(1, 2).split(heads, 1)
        return None, *parts, *[None] * 4


# ── what the model calls ──────────────────────────────────────────────────────────────────
def flash_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    rope: tuple[Float[Tensor, "#b t hd"], Float[Tensor, "#b t hd"]] | None,
    spans: Spans | None,
    joint: Float[Tensor, "b t w"] | None = None,
) -> Float[Tensor, "b h t hd"]:
    """softmax(R q (R k)' / sqrt(hd)) v over each query's span, R the rotation; tokens before heads
    in memory. Runs Triton kernels.

    Args:
        q: queries, not rotated; see `takes`.
        k: keys; each serves h / kv query heads.
        v: values, likewise.
        rope: cos and sin of every position's angles, in q.dtype; None: nothing is rotated.
        where: what each query sees; None: all before it.
        joint: receives the gradients of q, k and v side by side, in their place (lora_linears.py).
    """
    cos, sin = rope if rope is not None else (None, None)
    first, last = spans if spans is not None else (None, None)
    return _FlashAttention.apply(joint, q, k, v, cos, sin, first, last)  # pyright: ignore
