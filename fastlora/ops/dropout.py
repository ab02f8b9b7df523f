"""Dropout whose mask is a pure function of (key, row, column): replayed, never stored.

A recomputed layer, a compiled graph, an eager run and a vmapped one all draw the same mask from
the same key, and no generator's state exists that could be read, advanced or restored.

The hash is the two-round 32-bit finaliser "triple-free" of C. Wellons' hash-prospector
(https://github.com/skeeto/hash-prospector, public domain; 16-0x21f0aaad-15-0x735a2d97-15, bias
0.107 of 1): both constants lie under 2**31, so products of 32-bit words never overflow int64.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF


def hash32(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Mix the low 32 bits of an int64 tensor; uniform over [0, 2**32), int64."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def fold(key: Int[Tensor, ""], data: int) -> Int[Tensor, ""]:
    """A new key from a key and a number: one per layer, one per projection. Both words of the
    64-bit key count, so seeds that differ by 2**32 differ."""
    high = hash32((key >> 32) + 0x9E3779B9 * (data + 1))
    return hash32(key ^ high)


def keep_mask(
    key: Int[Tensor, ""], rows: int, columns: int, p: float, device: torch.device
) -> Bool[Tensor, "rows columns"]:
    """True with probability 1 - p (to 2**-32), independently per element."""
    row = hash32(torch.arange(rows, device=device) ^ key)
    # `& _WORD` changes no value: it keeps Inductor from folding the product into an int32 index,
    # where Triton refuses a constant over 2**31 (torch 2.11, triton 3.6).
    column = (torch.arange(columns, device=device) & _WORD) * 0x9E3779B1
    return hash32(row[:, None] + column) >= int(p * 2**32)


def dropout(
    x: Float[Tensor, "*n d"], p: float, key: Int[Tensor, ""] | None
) -> Float[Tensor, "*n d"]:
    """Zero a share p of x, scale the rest by 1 / (1 - p); x itself where key is None or p is 0."""
    if key is None or p == 0.0:
        return x
    keep = keep_mask(key, math.prod(x.shape[:-1]), x.shape[-1], p, x.device).view(x.shape)
    return torch.where(keep, x / (1.0 - p), 0.0)
