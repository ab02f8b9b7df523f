"""Causal attention with grouped query heads: softmax(q k' / sqrt(hd)) v."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fastlora.ops.dispatch import transforms_active


def attention_reference(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    mask: Bool[Tensor, "#b 1 t s"] | None,
) -> Float[Tensor, "b h t hd"]:
    """The specification, written out: softmax in at least float32, weights in v.dtype.

    Differentiable forward, backward and twice, and under vmap, which no fused kernel is
    (torch 2.11 and 2.13). Holds the whole [b, h, t, s] score matrix.
    """
    b, h, t, hd = q.shape
    kv, s = k.shape[1], k.shape[2]
    grouped = q.reshape(b, kv, h // kv, t, hd)
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2) / math.sqrt(hd)
    if mask is None:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)[None, None]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~mask.unsqueeze(2), -math.inf)
    weights = scores.softmax(-1).to(v.dtype)
    return (weights @ v.unsqueeze(2)).reshape(b, h, t, hd)


def attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    mask: Bool[Tensor, "#b 1 t s"] | None,
    *,
    deterministic: bool = False,
) -> Float[Tensor, "b h t hd"]:
    """Attention through SDPA's fused kernels; the reference under a torch.func transform.

    Args:
        q: queries.
        k: keys; each serves h / kv query heads.
        v: values, likewise.
        mask: True where a query may look; every row must have one True. None is plain causal
            (t == s), the case the flash kernels serve.
        deterministic: same bits every run. On CUDA every fused backward adds with atomics (flash,
            cuDNN and memory-efficient gave other bits on a second run; H200, torch 2.11), so there
            it is the reference: [b, h, t, s] scores, some ten times the time. flash_attention.py,
            which a training step in 16 bits runs, gives the same bits always.
    """
    if transforms_active() or (deterministic and q.is_cuda):
        return attention_reference(q, k, v, mask)
    groups = q.shape[1] // k.shape[1]
    if mask is not None or q.dtype not in (torch.float16, torch.bfloat16) or not q.is_cuda:
        # Only CUDA's flash and cuDNN kernels share key heads by themselves; the memory-efficient
        # kernel, which masks and float32 need, would fall back to the full score matrix. Repeating
        # costs cuDNN 5 % (2.00 against 1.90 ms, forward and backward, 1B shapes, 4 x 2048, H200).
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # A plain bool: where head counts are symbolic (a second model of another shape), dynamo hands
    # SDPA `groups > 1`, and bool() of it, as a SymBool, which it refuses (torch 2.11 and 2.13).
    enable_gqa = True if groups > 1 else False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
