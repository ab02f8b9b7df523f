"""Inputs of `decode_attention`, and torch's attention of the same rows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.attention.rope import apply_rope

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
S = 1000 if CUDA else 200
# Empty rows, rows around multiples of a block, full rows, and one that a slot without a running
# row may hold.
LENGTHS = [0, 1, 63, 64, 65, S // 2, S - 2, S - 1, S + 5]


def drawn(heads: tuple, dtype: torch.dtype, lengths=LENGTHS, s: int = S, rotated: bool = True):
    """The arguments of decode_attention up to `lengths`; unused cache entries are NaN."""
    (h, kv, hd), b = heads, len(lengths)
    gen = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=gen).to(DEVICE, dtype)
    caches = [new(b, kv, s, hd) for _ in range(2)]
    for i, n in enumerate(lengths):
        for cache in caches:
            cache[i, :, n:] = math.nan
    angles = torch.rand(b, hd // 2, generator=gen).repeat(1, 2) * 6
    tables = [angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)]
    tables = tables if rotated else [None, None]
    return [new(b, h, hd), new(b, kv, hd), new(b, kv, hd), *tables, *caches,
            torch.tensor(lengths, device=DEVICE)]  # fmt: skip


def copied(given: list, dtype: torch.dtype | None = None) -> list:
    """The arguments with tensors of their own; floating ones in dtype."""
    cast = lambda x: x.to(dtype) if dtype is not None and x.is_floating_point() else x
    return [None if x is None else cast(x).clone() for x in given]


def by_sdpa(given: list, window: int | None) -> Tensor:
    """torch's attention of each row alone over the keys that it sees; writes to no cache."""
    q, k, v, cos, sin, k_cache, v_cache, lengths = given
    if cos is not None:
        q, k = (apply_rope(x[:, :, None], cos[:, None], sin[:, None])[:, :, 0] for x in (q, k))
    rows = []
    for i, n in enumerate(lengths.clamp(max=k_cache.shape[2] - 1).tolist()):
        first = 0 if window is None else max(0, n + 1 - window)
        keys = torch.cat([k_cache[i, :, first:n], k[i, :, None]], 1)
        values = torch.cat([v_cache[i, :, first:n], v[i, :, None]], 1)
        rows.append(
            F.scaled_dot_product_attention(
                q[i : i + 1, :, None], keys[None], values[None], enable_gqa=True
            )[0, :, 0]
        )
    return torch.stack(rows)
