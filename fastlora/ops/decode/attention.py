"""Attention of one new token per row over a slotted key-value cache: softmax(q k' / sqrt(hd)) v.

The keys of a row are split among several programs (flash-decoding; Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), because one row and key head alone cannot
read memory at the card's speed. How many programs start depends on the cache's size only, and each
finds its keys from `lengths` on the device, so one captured CUDA graph serves all lengths.

The reference below is the specification; decode_attention runs the kernel of attention_kernel.py
or the reference.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.attention.rope import apply_rope
from fastlora.ops.dispatch import Kernels, use_kernel
from fastlora.ops.soft_cap import soft_cap


def decode_attention_reference(
    q: Float[Tensor, "b h hd"],
    k: Float[Tensor, "b kv hd"],
    v: Float[Tensor, "b kv hd"],
    cos: Float[Tensor, "b hd"] | None,
    sin: Float[Tensor, "b hd"] | None,
    k_cache: Float[Tensor, "b kv S hd"],
    v_cache: Float[Tensor, "b kv S hd"],
    lengths: Int[Tensor, "b"],
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b h hd"]:
    """The specification: softmax in at least float32, weights rounded to v.dtype.

    All S entries of the caches are read and must be finite; those that a row does not see have
    weight 0. See `decode_attention` for the arguments.
    """
    (b, h, hd), (kv, S) = q.shape, k_cache.shape[1:3]
    if cos is not None and sin is not None:
        tables = (cos.unsqueeze(1), sin.unsqueeze(1))
        q, k = (apply_rope(x.unsqueeze(2), *tables).squeeze(2) for x in (q, k))
    last = lengths.clamp(max=S - 1)
    at = last.view(b, 1, 1, 1).expand(b, kv, 1, hd)
    k_cache.scatter_(2, at, k.unsqueeze(2))
    v_cache.scatter_(2, at, v.unsqueeze(2))
    index = torch.arange(S, device=q.device)
    seen = index <= last[:, None]
    if window is not None:
        seen &= index > last[:, None] - window
    scores = q.reshape(b, kv, h // kv, hd) @ k_cache.transpose(-1, -2)
    scores = scores / math.sqrt(hd) if scale is None else scores * scale
    scores = soft_cap(scores.to(torch.promote_types(q.dtype, torch.float32)), cap)
    weights = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1).to(v.dtype)
    return (weights @ v_cache).reshape(b, h, hd)


def decode_kernel_serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel has this dtype and head size."""
    known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and head_dim % 16 == 0 and head_dim <= 256


def decode_kernel_supports(
    q: Float[Tensor, "b h hd"], k_cache: Float[Tensor, "b kv S hd"], v_cache: Float[Tensor, "..."]
) -> bool:
    """Whether the kernel supports the dtype, the head size and the layout of the caches.

    Each key head's keys must be adjacent, [S, hd] in memory; slots and key heads may have any
    stride, the same in both caches.
    """
    hd = q.shape[-1]
    same = q.dtype == k_cache.dtype == v_cache.dtype and k_cache.stride() == v_cache.stride()
    adjacent = k_cache.stride(3) == 1 and k_cache.stride(2) == hd
    return decode_kernel_serves(q.dtype, hd) and same and adjacent


@torch.no_grad()
def decode_attention(
    q: Float[Tensor, "b h hd"],
    k: Float[Tensor, "b kv hd"],
    v: Float[Tensor, "b kv hd"],
    cos: Float[Tensor, "b hd"] | None,
    sin: Float[Tensor, "b hd"] | None,
    k_cache: Float[Tensor, "b kv S hd"],
    v_cache: Float[Tensor, "b kv S hd"],
    lengths: Int[Tensor, "b"],
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
    *,
    kernels: Kernels = "auto",
) -> Float[Tensor, "b h hd"]:
    """Write each row's new key and value to its caches, and attend from its new token.

    Row i writes at index lengths[i] and sees the indices from max(0, lengths[i] + 1 - window) to
    lengths[i]. Synchronises nothing. The result has no gradient.

    Args:
        q: queries of the new tokens, not rotated; each key head serves h / kv query heads.
        k: keys of the new tokens, not rotated.
        v: values of the new tokens.
        cos: cosines of each row's position, in q.dtype; None: no rotation.
        sin: sines of each row's position; None if cos is None.
        k_cache: rotated keys, in q.dtype. Index lengths[i] of each row i is written in place.
        v_cache: values, in the same layout. Written in place.
        lengths: how many tokens each row holds already, in [0, S). A larger number counts as
            S - 1, so that a slot without a running row cannot write outside its cache.
        window: how many keys a token sees at most, including its own; None: all.
        scale: factor of the scores; None: 1 / sqrt(hd).
        cap: scores s become cap * tanh(s / cap); None: they stay.
        kernels: "auto": the Triton kernel on CUDA if `decode_kernel_supports` the tensors;
            "torch": the reference; "triton": the kernel, on the CPU in Triton's interpreter.
    """
    if not (use_kernel(q, kernels) and decode_kernel_supports(q, k_cache, v_cache)):
        given = (q, k, v, cos, sin, k_cache, v_cache, lengths, window, scale, cap)
        return decode_attention_reference(*given)
    from fastlora.ops.decode.attention_kernel import decode_forward  # noqa: PLC0415  imports triton

    given = (q, k, v, cos, sin, k_cache, v_cache, lengths, window)
    return decode_forward(*given, scale=scale, cap=cap)
