"""Attention where each query sees one span of keys, from some first key up to itself: packed
documents and sliding windows, at the cost of the blocks that are seen.

Through torch's flex_attention (Dong et al. 2024, arXiv:2412.05496), which skips blocks of 128
queries by 128 keys where no query sees a key, and asks a block's elements only where some do and
some do not. Its backward pass adds without atomics: the same bits every run, which no fused SDPA
backward on CUDA gave (scripts/bench_results/2026-11-27-packed-attention.txt).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # tokens of one block, queries and keys alike


class Spans(NamedTuple):
    """What each query sees, and the lists of blocks that follow from it (n = t / 128).

    For each block of queries, how many blocks of keys it sees in part and which; the same of those
    it sees whole; then both again for each block of keys, which the backward pass walks by. The
    entries of a list beyond its number mean nothing.
    """

    first: Int[Tensor, "b t"]  # the first key that a query sees
    keys: Int[Tensor, "b 1 n"]
    key_list: Int[Tensor, "b 1 n n"]
    whole_keys: Int[Tensor, "b 1 n"]
    whole_key_list: Int[Tensor, "b 1 n n"]
    queries: Int[Tensor, "b 1 n"]
    query_list: Int[Tensor, "b 1 n n"]
    whole_queries: Int[Tensor, "b 1 n"]
    whole_query_list: Int[Tensor, "b 1 n n"]


def takes(dtype: torch.dtype, head_dim: int, t: int) -> bool:
    """Whether the kernel was measured, and found right, for such tensors on a CUDA GPU. It has to
    be compiled: eager flex_attention holds all scores."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim in (64, 128) and t % BLOCK == 0


def spans(first: Int[Tensor, "b t"]) -> Spans:
    """The lists of blocks, made on the tensor's device without waiting for it.

    Args:
        first: for each query, the index of the first key it sees, at most its own; never falling
            along a row. t is a multiple of 128.
    """
    b, t = first.shape
    n = t // BLOCK
    by_block = first.view(b, n, BLOCK)
    # A block of keys is seen from where the first query's span begins, and wholly (by every query,
    # each of whose keys lies before it) from where the last query's does.
    begins, all_begin = by_block[..., 0, None], by_block[..., -1, None]
    block = torch.arange(n, device=first.device)
    start, before = block * BLOCK, block[:, None] > block
    seen = ((start + BLOCK > begins) & before) | (block[:, None] == block)
    whole = (start >= all_begin) & before
    lists = [_lists(x) for x in (seen & ~whole, whole)]
    lists += [_lists(x.transpose(1, 2)) for x in (seen & ~whole, whole)]
    return Spans(first.to(torch.int32), *(x for pair in lists for x in pair))


def _lists(seen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which): of each row of [b, n, n] truths the true columns first, in order."""
    # Contiguous: the kernel takes a list's entries to lie side by side, a transpose's do not.
    seen = seen.to(torch.int8, memory_format=torch.contiguous_format)
    order = seen.argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def span_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    where: Spans,
) -> Float[Tensor, "b h t hd"]:
    """softmax(q k' / sqrt(hd)) v over each query's span; to be called where torch.compile sees it.

    Args:
        q: queries, 16-bit; see `takes`.
        k: keys; each serves h / kv query heads.
        v: values, likewise.
        where: what each query sees.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= where.first[row, query])

    t = q.shape[2]
    blocks = BlockMask(
        seq_lengths=(t, t),
        kv_num_blocks=where.keys,
        kv_indices=where.key_list,
        full_kv_num_blocks=where.whole_keys,
        full_kv_indices=where.whole_key_list,
        q_num_blocks=where.queries,
        q_indices=where.query_list,
        full_q_num_blocks=where.whole_queries,
        full_q_indices=where.whole_query_list,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )
    shared = True if k.shape[1] != q.shape[1] else False  # a plain bool: ops/attention.py
    out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=shared)
    assert isinstance(out, Tensor)
    return out
