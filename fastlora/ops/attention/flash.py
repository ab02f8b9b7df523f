"""Causal attention in which each query sees one span of keys that ends at its own position
(Dao 2023, arXiv:2307.08691).

Spans describe unpadded rows, packed documents and sliding windows. Only the blocks of keys that
some query sees cost time.

The specification is `attention_reference` of attention.py, applied to rotated queries and keys with
the mask that the spans describe. The op runs flash_kernel.py. Its backward pass applies RoPE's
gradient before it stores dq and dk, which saves one read and one write of both. It gives the same
bits in every run; SDPA's fused backward passes on CUDA do not.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.attention.rope import apply_rope
from fastlora.ops.launch import implement


class Spans(NamedTuple):
    """The keys that each query sees. Both fields are non-decreasing along each row.

    In a row of two packed documents, tokens 0-2 and 3-4:

        first = [0, 0, 0, 3, 3]    last = [2, 2, 2, 4, 4]
    """

    first: Int[Tensor, "b t"]  # int32: first key that each query sees; the last is its own position
    last: Int[Tensor, "b t"]  # int32: last query that sees each key


def make_spans(first: Int[Tensor, "b t"]) -> Spans:
    """Spans from their `first` field, computed on its device without a synchronisation."""
    index = torch.arange(first.shape[1], device=first.device).expand_as(first).contiguous()
    first = first.contiguous()
    last = torch.searchsorted(first, index, right=True, out_int32=True) - 1
    return Spans(first.to(torch.int32), last)


# head_dim -> the longest rows for which our kernels take less time than cuDNN's, in causal
# attention without spans. On longer rows ours take up to 8 % (64) and 28 % (128) more (H100,
# attention-lengths-2026-11-27 in scripts/bench/results.jsonl). With heads of 256 cuDNN takes 0.50
# to 0.72 of our time, forward and backward together (H200, attention-lengths-256-2026-11-30, with
# another tile of dk and dv), so ours run only where cuDNN's cannot.
_LONGEST_FASTEST = {64: 8192, 128: 2048, 256: 0}


def kernel_supports(dtype: torch.dtype, heads: int, head_dim: int, t: int) -> bool:
    """Whether the kernels are tested for this dtype and head size on CUDA, and t is not too long.

    The kernels compute offsets within a row in 32 bits.
    """
    known = dtype in (torch.float16, torch.bfloat16) and head_dim in _LONGEST_FASTEST
    return known and t * heads * head_dim < 2**31


def kernel_is_faster(head_dim: int, t: int) -> bool:
    """Whether our kernels are faster than cuDNN's for causal attention without spans."""
    return t <= _LONGEST_FASTEST[head_dim]


# ── op and derivative ─────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::flash_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? first, float? scale=None, float? cap=None)"
    " -> (Tensor, Tensor)",
)

torch.library.define(
    "fastlora::flash_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? first,"
    " Tensor? last, Tensor? cos, Tensor? sin, float? scale=None, float? cap=None) -> Tensor",
)


@implement("fastlora::flash_attention")
def _flash_attention(*args):
    from fastlora.ops.attention.flash_kernel import flash_forward  # noqa: PLC0415  imports triton

    return flash_forward(*args)


@implement("fastlora::flash_attention_backward")
def _flash_attention_backward(*args):
    from fastlora.ops.attention.flash_kernel import flash_backward  # noqa: PLC0415  imports triton

    return flash_backward(*args)


@torch.library.register_fake("fastlora::flash_attention")
def _(q, k, v, first, scale=None, cap=None):
    b, h, t, hd = q.shape
    out = q.new_empty(b, t, h, hd).transpose(1, 2)
    return out, q.new_empty(b, h, t, dtype=torch.float32)


@torch.library.register_fake("fastlora::flash_attention_backward")
def _(dout, q, k, v, out, lse, first, last, cos, sin, scale=None, cap=None):
    b, h, t, hd = q.shape
    return q.new_empty(b, t, (h + 2 * k.shape[1]) * hd)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, q, k, v, cos, sin, first, last, scale, cap):
        ctx.joint, ctx.scale_and_cap = joint is not None, (scale, cap)
        # We save rotated q and k, so the backward pass need not rotate them again.
        if cos is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, lse = torch.ops.fastlora.flash_attention(q, k, v, first, scale, cap)
        ctx.save_for_backward(q, k, v, out, lse, first, last, cos, sin)
        return out

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but the kernel is not differentiable
            raise RuntimeError(
                "the fused attention has no second derivative; differentiate fastlora.functional"
                " with torch.func, which runs the reference."
            )
        kept = ctx.saved_tensors
        grads = torch.ops.fastlora.flash_attention_backward(dout, *kept, *ctx.scale_and_cap)
        if ctx.joint:  # the placeholder takes the gradients of q, k and v as one tensor
            return grads, *[None] * 9
        b, t, _ = grads.shape
        heads = [x.shape[1] for x in kept[:3]]
        parts = grads.view(b, t, sum(heads), -1).transpose(1, 2).split(heads, 1)
        return None, *parts, *[None] * 6


# ── public function ───────────────────────────────────────────────────────────────────────
def flash_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    rope: tuple[Float[Tensor, "#b t hd"], Float[Tensor, "#b t hd"]] | None,
    spans: Spans | None,
    joint: Float[Tensor, "b t w"] | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b h t hd"]:
    """softmax(R q (R k)' / sqrt(hd)) v over each query's span, where R is RoPE's rotation.

    Runs Triton kernels. The result is a transposed view of a [b, t, h, hd] tensor.

    Args:
        q: queries, not rotated; `kernel_supports` says which dtypes and sizes.
        k: keys, not rotated; each key head serves h / kv query heads.
        v: values, with as many heads as k.
        rope: cos and sin of each position's angles, in q.dtype; None: no rotation.
        spans: the keys that each query sees; None: all keys up to its own position.
        joint: the placeholder for q, k and v side by side from `joint_lora_linears`, or None. If
            given, it receives their gradients as one tensor, and q, k and v receive none.
        scale: factor of the scores; None: 1 / sqrt(hd).
        cap: scores s become cap * tanh(s / cap); None: they stay.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    cos, sin = rope if rope is not None else (None, None)
    first, last = spans if spans is not None else (None, None)
    return _FlashAttention.apply(  # pyright: ignore
        joint, q, k, v, cos, sin, first, last, scale, cap
    )
