"""Causal attention with grouped query heads: softmax(q k' / sqrt(hd)) v."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fastlora.ops.dispatch import transforms_active
from fastlora.ops.soft_cap import soft_cap


def attention_reference(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    mask: Bool[Tensor, "#b 1 t s"] | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b h t hd"]:
    """The specification: softmax in at least float32, weights rounded to v.dtype.

    Supports forward mode, reverse mode, second derivatives and vmap; torch's fused kernels do not
    (torch 2.11 and 2.13). Materialises the [b, h, t, s] score matrix.
    """
    b, h, t, hd = q.shape
    kv, s = k.shape[1], k.shape[2]
    grouped = q.reshape(b, kv, h // kv, t, hd)
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    scores = scores / math.sqrt(hd) if scale is None else scores * scale
    if mask is None:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)[None, None]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = soft_cap(scores, cap).masked_fill(~mask.unsqueeze(2), -math.inf)
    weights = scores.softmax(-1).to(v.dtype)
    return (weights @ v.unsqueeze(2)).reshape(b, h, t, hd)


def attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    mask: Bool[Tensor, "#b 1 t s"] | None,
    *,
    deterministic: bool = False,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b h t hd"]:
    """Attention through SDPA's fused kernels; the reference under a torch.func transform.

    Args:
        q: queries.
        k: keys; each key head serves h / kv query heads.
        v: values, with as many heads as k.
        mask: True where a query sees a key; every row needs at least one True. None means causal
            attention with t == s, the only case that SDPA's flash kernels support.
        deterministic: give the same bits in every run. On CUDA this runs the reference, at about
            ten times the time, because SDPA's fused backward passes add with atomics (flash, cuDNN
            and memory-efficient all gave different bits on a second run; H200, torch 2.11).
            flash.py is deterministic without this option.
        scale: factor of the scores; None: 1 / sqrt(hd).
        cap: scores s become cap * tanh(s / cap), which SDPA does not compute: the reference runs.
    """
    if transforms_active() or (deterministic and q.is_cuda) or cap is not None:
        return attention_reference(q, k, v, mask, scale, cap)
    groups = q.shape[1] // k.shape[1]
    if mask is not None or q.dtype not in (torch.float16, torch.bfloat16) or not q.is_cuda:
        # Only CUDA's flash and cuDNN kernels support grouped heads. With a mask or in float32 only
        # the memory-efficient kernel applies; with grouped heads SDPA would fall back from it to
        # the full score matrix. Repeating keys and values costs cuDNN 5 % (2.00 ms against 1.90 ms,
        # forward and backward, 1B shapes, 4 x 2048 tokens, H200).
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    # A literal bool. When head counts are symbolic (after a second model with other shapes), dynamo
    # passes both `groups > 1` and bool(groups > 1) to SDPA as a SymBool, and SDPA raises (torch
    # 2.11 and 2.13).
    enable_gqa = True if groups > 1 else False
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
    )
